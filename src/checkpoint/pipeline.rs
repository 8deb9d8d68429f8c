//! Processes items on all threads without barriers; results arrive in order.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard},
};

use super::{CheckpointError, Context, direct::free_spare_buffers};

/// Maps `items` on all threads and passes the results to `sink` in the items' order.
///
/// `cost` is the maximum number of bytes that an item uses at any time from reading until `sink` receives it: windows,
/// scratch memory, result. An item starts only when all items in flight, including it, fit in [`Context::pass_bytes`],
/// so memory is bounded for any items. Returns the error of the first failing item in order, whichever thread fails
/// first. `sink` runs on the calling thread.
///
/// # Errors
/// Errors of `map` or `sink`; [`CheckpointError::MemoryLimit`] if a single item exceeds the available memory;
/// [`CheckpointError::Cancelled`].
pub fn for_each_ordered<T, R, E>(
    ctx: &Context<'_>,
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    cost: impl Fn(&T) -> u64 + Sync,
    map: impl Fn(&T) -> Result<R, E> + Sync,
    sink: impl FnMut(T, R) -> Result<(), E>,
) -> Result<(), E>
where
    T: Send,
    R: Send,
    E: From<CheckpointError> + Send,
{
    let line = Pipeline::new(ctx, items.into_iter(), 0, &cost);
    line.run(ctx, &|_: &T| Ok(()), &|item: &T, ()| map(item), sink)
}

/// As [`for_each_ordered`], with `n_readers` extra threads that `read` the input of `map`: reading continues while all
/// cores are busy, and the disk has more than one request queued. Without readers, the mapping threads read. See
/// [`n_readers`](super::n_readers).
///
/// At most one item per thread is read ahead.
///
/// # Errors
/// Errors of `read`, `map` or `sink`, and those of [`for_each_ordered`].
pub fn read_and_map_ordered<T, W, R, E>(
    ctx: &Context<'_>,
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    cost: impl Fn(&T) -> u64 + Sync,
    n_readers: usize,
    read: impl Fn(&T) -> Result<W, E> + Sync,
    map: impl Fn(&T, W) -> Result<R, E> + Sync,
    sink: impl FnMut(T, R) -> Result<(), E>,
) -> Result<(), E>
where
    T: Send,
    W: Send,
    R: Send,
    E: From<CheckpointError> + Send,
{
    Pipeline::new(ctx, items.into_iter(), n_readers, &cost).run(ctx, &read, &map, sink)
}

/// The items in flight between the threads.
struct Pipeline<'c, I: Iterator, W, R, E> {
    /// Bytes that an item uses.
    cost: &'c (dyn Fn(&I::Item) -> u64 + Sync + 'c),
    /// A copy that is used for its limits alone.
    limits: Context<'static>,
    state: Mutex<State<I, W, R, E>>,
    /// Notified of every change that a thread may wait for.
    changed: Condvar,
    n_readers: usize,
    /// Maximum number of items that are taken but not yet passed to the sink.
    max_in_flight: usize,
}

struct State<I: Iterator, W, R, E> {
    items: I,
    /// The next item, if it had to wait for memory.
    waiting: Option<I::Item>,
    has_ended: bool,
    n_taken: usize,
    n_sunk: usize,
    /// The total cost of the items that are taken but not yet sunk.
    bytes_in_flight: u64,
    /// Number of items that readers have taken and no mapping thread has.
    n_read_ahead: usize,
    read: VecDeque<(usize, I::Item, Result<W, E>)>,
    /// Results, starting with item `n_sunk`.
    results: VecDeque<Option<Finished<I::Item, R, E>>>,
    is_stopped: bool,
}

/// An item and its result.
type Finished<T, R, E> = (T, Result<R, E>);

/// The next task of a thread.
enum Task<T, W, E> {
    Read(usize, T),
    Map(usize, T, Result<W, E>),
    Nothing,
}

type ReadFn<'a, T, W, E> = &'a (dyn Fn(&T) -> Result<W, E> + Sync + 'a);
type MapFn<'a, T, W, R, E> = &'a (dyn Fn(&T, W) -> Result<R, E> + Sync + 'a);

impl<'c, I, W, R, E> Pipeline<'c, I, W, R, E>
where
    I: Iterator + Send,
    I::Item: Send,
    W: Send,
    R: Send,
    E: From<CheckpointError> + Send,
{
    fn new(ctx: &Context<'_>, items: I, n_readers: usize, cost: &'c (dyn Fn(&I::Item) -> u64 + Sync + 'c)) -> Self {
        let state = State {
            items,
            waiting: None,
            bytes_in_flight: 0,
            has_ended: false,
            n_taken: 0,
            n_sunk: 0,
            n_read_ahead: 0,
            read: VecDeque::new(),
            results: VecDeque::new(),
            is_stopped: false,
        };
        let max_in_flight = 4 * rayon::current_num_threads() + 2 * n_readers;
        let limits = Context { max_memory: ctx.max_memory, ..Context::default() };
        Self { cost, limits, state: Mutex::new(state), changed: Condvar::new(), n_readers, max_in_flight }
    }

    fn run(
        &self,
        ctx: &Context<'_>,
        read: ReadFn<'_, I::Item, W, E>,
        map: MapFn<'_, I::Item, W, R, E>,
        mut sink: impl FnMut(I::Item, R) -> Result<(), E>,
    ) -> Result<(), E> {
        // The calling thread works too if it belongs to the pool, which may have no other thread.
        let caller_maps = rayon::current_thread_index().is_some();
        let done = std::thread::scope(|readers| {
            for _ in 0..self.n_readers {
                readers.spawn(|| self.read_all(read));
            }
            rayon::in_place_scope(|pool| {
                for _ in usize::from(caller_maps)..rayon::current_num_threads() {
                    pool.spawn(|_| self.map_all(read, map));
                }
                let stop = StopOnDrop(self);
                let done = self.sink_all(ctx, read, map, caller_maps, &mut sink);
                drop(stop);
                done
            })
        });
        free_spare_buffers();
        done
    }

    /// The part of the calling thread.
    fn sink_all(
        &self,
        ctx: &Context<'_>,
        read: ReadFn<'_, I::Item, W, E>,
        map: MapFn<'_, I::Item, W, R, E>,
        caller_maps: bool,
        sink: &mut dyn FnMut(I::Item, R) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        loop {
            if state.is_stopped {
                // Another thread panicked; leaving the scopes propagates the panic.
                return Err(CheckpointError::Cancelled.into());
            }
            if let Some(Some(_)) = state.results.front() {
                let (item, result) = state.results.pop_front().flatten().expect("the front was just checked");
                state.n_sunk += 1;
                drop(state);
                ctx.check()?;
                let cost = (self.cost)(&item);
                sink(item, result?)?;
                state = self.lock();
                state.bytes_in_flight = state.bytes_in_flight.saturating_sub(cost);
                self.changed.notify_all();
                continue;
            }
            if state.has_ended && state.n_sunk == state.n_taken {
                return ctx.check().map_err(E::from);
            }
            let task = if caller_maps { self.next_to_map(&mut state) } else { Task::Nothing };
            state = match task {
                // Looking for the next item may have found the end.
                Task::Nothing if state.has_ended && state.n_sunk == state.n_taken => state,
                Task::Nothing => self.changed.wait(state).expect("no thread panics while holding the lock"),
                task => {
                    drop(state);
                    ctx.check()?;
                    self.do_map(task, read, map);
                    self.lock()
                }
            };
        }
    }

    fn map_all(&self, read: ReadFn<'_, I::Item, W, E>, map: MapFn<'_, I::Item, W, R, E>) {
        let stop = StopOnPanic(self);
        let mut state = self.lock();
        while !state.is_stopped {
            match self.next_to_map(&mut state) {
                Task::Nothing if state.has_ended && state.n_read_ahead == 0 => break,
                Task::Nothing => state = self.changed.wait(state).expect("no thread panics while holding the lock"),
                task => {
                    drop(state);
                    self.do_map(task, read, map);
                    state = self.lock();
                }
            }
        }
        drop(state);
        drop(stop);
    }

    fn read_all(&self, read: ReadFn<'_, I::Item, W, E>) {
        let stop = StopOnPanic(self);
        let mut state = self.lock();
        while !state.is_stopped && !state.has_ended {
            if state.n_read_ahead >= self.n_readers + rayon::current_num_threads() {
                state = self.changed.wait(state).expect("no thread panics while holding the lock");
                continue;
            }
            match self.take(&mut state) {
                Some((at, item)) => {
                    state.n_read_ahead += 1;
                    drop(state);
                    let bytes = read(&item);
                    state = self.lock();
                    state.read.push_back((at, item, bytes));
                    self.changed.notify_all();
                }
                None if state.has_ended => self.changed.notify_all(),
                None => state = self.changed.wait(state).expect("no thread panics while holding the lock"),
            }
        }
        drop(state);
        drop(stop);
    }

    fn next_to_map(&self, state: &mut State<I, W, R, E>) -> Task<I::Item, W, E> {
        if let Some((at, item, bytes)) = state.read.pop_front() {
            state.n_read_ahead -= 1;
            self.changed.notify_all();
            return Task::Map(at, item, bytes);
        }
        if self.n_readers > 0 {
            return Task::Nothing;
        }
        match self.take(state) {
            Some((at, item)) => Task::Read(at, item),
            None => Task::Nothing,
        }
    }

    /// Takes the next item, if there is one and it fits. The first item in flight never waits.
    fn take(&self, state: &mut State<I, W, R, E>) -> Option<(usize, I::Item)> {
        if state.has_ended || state.n_taken - state.n_sunk >= self.max_in_flight {
            return None;
        }
        let Some(item) = state.waiting.take().or_else(|| state.items.next()) else {
            state.has_ended = true;
            self.changed.notify_all();
            return None;
        };
        let cost = (self.cost)(&item);
        if let Err(e) = self.limits.check_fits(cost) {
            // Reported in its order, after the results of the items before it.
            state.n_taken += 1;
            state.results.push_back(Some((item, Err(e.into()))));
            state.has_ended = true;
            self.changed.notify_all();
            return None;
        }
        if state.bytes_in_flight + cost > self.limits.pass_bytes() {
            state.waiting = Some(item);
            return None;
        }
        state.bytes_in_flight += cost;
        state.n_taken += 1;
        state.results.push_back(None);
        Some((state.n_taken - 1, item))
    }

    fn do_map(&self, task: Task<I::Item, W, E>, read: ReadFn<'_, I::Item, W, E>, map: MapFn<'_, I::Item, W, R, E>) {
        let (at, item, bytes) = match task {
            Task::Read(at, item) => {
                let bytes = read(&item);
                (at, item, bytes)
            }
            Task::Map(at, item, bytes) => (at, item, bytes),
            Task::Nothing => return,
        };
        let result = bytes.and_then(|bytes| map(&item, bytes));
        let mut state = self.lock();
        let slot = at - state.n_sunk;
        state.results[slot] = Some((item, result));
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<I, W, R, E>> {
        self.state.lock().expect("no thread panics while holding the lock")
    }
}

impl<I: Iterator, W, R, E> Pipeline<'_, I, W, R, E> {
    fn stop(&self) {
        if let Ok(mut state) = self.state.lock() {
            state.is_stopped = true;
        }
        self.changed.notify_all();
    }
}

/// Stops all threads when the calling thread leaves, successfully or not.
struct StopOnDrop<'a, 'c, I: Iterator, W, R, E>(&'a Pipeline<'c, I, W, R, E>);

impl<I: Iterator, W, R, E> Drop for StopOnDrop<'_, '_, I, W, R, E> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Stops the others if a thread panics, so that nobody waits for it.
struct StopOnPanic<'a, 'c, I: Iterator, W, R, E>(&'a Pipeline<'c, I, W, R, E>);

impl<I: Iterator, W, R, E> Drop for StopOnPanic<'_, '_, I, W, R, E> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

    use super::*;

    fn in_pool<R: Send>(n_threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap().install(f)
    }

    fn run(n_readers: usize) -> (Vec<usize>, usize) {
        let (on_the_way, max_seen) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let mut seen = Vec::new();
        read_and_map_ordered(
            &Context::default(),
            0..500usize,
            |_| 1,
            n_readers,
            |&i| {
                max_seen.fetch_max(on_the_way.fetch_add(1, SeqCst), SeqCst);
                Ok::<_, CheckpointError>(i * 2)
            },
            |&i, read| {
                // Uneven work, so that results finish out of order.
                std::thread::sleep(std::time::Duration::from_micros((i as u64 * 7919) % 97));
                Ok(read + i)
            },
            |i, result| {
                on_the_way.fetch_sub(1, SeqCst);
                assert_eq!(result, 3 * i);
                seen.push(i);
                Ok(())
            },
        )
        .unwrap();
        (seen, max_seen.into_inner())
    }

    #[test]
    fn results_come_in_order_and_few_are_in_flight() {
        for n_threads in [1, 2, 5] {
            for n_readers in [0, 1, 3] {
                let (seen, max_seen) = in_pool(n_threads, || run(n_readers));
                assert_eq!(seen, (0..500).collect::<Vec<_>>());
                assert!(
                    max_seen < 4 * n_threads + 2 * n_readers + 1,
                    "{max_seen} with {n_threads} threads, {n_readers} readers"
                );
            }
        }
        assert_eq!(run(2).0.len(), 500);
    }

    #[test]
    fn the_first_error_in_order_is_returned() {
        let failing = |ok_until: usize, n_readers| {
            let error = |i: usize| CheckpointError::bad_file("f".as_ref(), format!("item {i}"));
            let mut n_sunk = 0;
            let map = |&i: &usize, ()| {
                std::thread::sleep(std::time::Duration::from_micros(((100 - i) * 10) as u64));
                if i >= ok_until { Err(error(i)) } else { Ok(()) }
            };
            let done = read_and_map_ordered(
                &Context::default(),
                0..100,
                |_| 1,
                n_readers,
                |_| Ok(()),
                map,
                |_, ()| {
                    n_sunk += 1;
                    Ok(())
                },
            );
            (n_sunk, done.unwrap_err().to_string())
        };
        for n_readers in [0, 2] {
            let (n_sunk, message) = failing(37, n_readers);
            assert_eq!(n_sunk, 37);
            assert!(message.contains("item 37"), "{message}");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        for n_readers in [0, 2] {
            let map = |&i: &usize, ()| if i == 5 { panic!("item five") } else { Ok::<_, CheckpointError>(()) };
            let run =
                || read_and_map_ordered(&Context::default(), 0..50, |_| 1, n_readers, |_| Ok(()), map, |_, ()| Ok(()));
            assert!(std::panic::catch_unwind(run).is_err());
        }
    }

    /// Runs 200 items of different costs; returns the maximum total cost in flight.
    fn max_in_flight(n_readers: usize) -> u64 {
        let ctx = Context { max_memory: 16 << 20, ..Context::default() };
        let cost = |i: u64| 1 + (i * 7919) % (4 << 20);
        let (on_the_way, max_seen) = (AtomicU64::new(0), AtomicU64::new(0));
        let mut seen = Vec::new();
        read_and_map_ordered(
            &ctx,
            0..200u64,
            |&i| cost(i),
            n_readers,
            |&i| {
                max_seen.fetch_max(on_the_way.fetch_add(cost(i), SeqCst) + cost(i), SeqCst);
                Ok::<_, CheckpointError>(())
            },
            |_, ()| Ok(()),
            |i, ()| {
                seen.push(i);
                on_the_way.fetch_sub(cost(i), SeqCst);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(seen, (0..200).collect::<Vec<_>>());
        max_seen.into_inner()
    }

    #[test]
    fn items_in_flight_never_exceed_the_memory_of_a_pass() {
        for n_threads in [1, 5] {
            for n_readers in [0, 3] {
                let max_seen = in_pool(n_threads, || max_in_flight(n_readers));
                assert!(max_seen <= 8 << 20, "{max_seen} bytes with {n_threads} threads, {n_readers} readers");
            }
        }
    }

    #[test]
    fn an_item_that_can_never_fit_reports_the_limit_it_needs() {
        let ctx = Context { max_memory: 16 << 20, ..Context::default() };
        let cost = |&i: &u64| if i == 7 { (20 << 20) + 1 } else { 1 };
        for n_readers in [0, 2] {
            let mut n_sunk = 0;
            let sink = |_, ()| {
                n_sunk += 1;
                Ok(())
            };
            let done = read_and_map_ordered(&ctx, 0..20, cost, n_readers, |_| Ok(()), |_, ()| Ok(()), sink);
            match done {
                Err(CheckpointError::MemoryLimit { needed, limit }) => {
                    assert_eq!((needed, limit, n_sunk), (41 << 20, 16 << 20, 7));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
