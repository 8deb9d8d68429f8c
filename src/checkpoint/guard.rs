//! Catches panics of dependencies that parse untrusted files.

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

thread_local! {
    /// Whether [`guarded`] catches this thread's panics, so that their messages are not printed.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// The guarded code panicked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Panicked;

/// Runs a dependency's code on an untrusted file; a panic becomes an error, and its message is not printed.
///
/// Data that `work` was changing may be in an inconsistent state after a panic: the caller drops it, or reports the
/// file as bad and stops using it. The first call wraps the process's panic hook; panics outside guarded code still
/// reach the previous hook.
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
        assert_eq!(nested, Ok((Err(Panicked), true)), "the outer guard is still active");
    }
}
