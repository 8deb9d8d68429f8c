//! Panics of dependencies that parse a stranger's file.

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

thread_local! {
    /// Whether a panic of this thread is caught by [`guarded`], so that its message is not printed.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// The guarded code panicked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Panicked;

/// Runs code of a dependency on a stranger's file; a panic becomes an error, and its message is not printed.
///
/// What `work` changed before it panicked may be half changed: the caller drops it, or reports the file as bad and uses it no more.
/// The first call wraps the process's panic hook; panics outside of guarded code reach the hook that was there.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IS_GUARDED.get() {
                previous(info);
            }
        }));
    });
    let was_guarded = IS_GUARDED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    IS_GUARDED.set(was_guarded);
    result.map_err(|_payload| Panicked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_and_the_guard_ends_with_it() {
        assert_eq!(guarded(|| 7), Ok(7));
        assert_eq!(guarded(|| -> u8 { panic!("inside") }), Err(Panicked));
        assert!(!IS_GUARDED.get());
        let nested = guarded(|| (guarded(|| -> u8 { panic!("inner") }), IS_GUARDED.get()));
        assert_eq!(nested, Ok((Err(Panicked), true)), "the outer guard still holds");
    }
}
