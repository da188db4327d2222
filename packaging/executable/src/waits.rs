//! Semaphores whose time-outs do not follow the wall clock.
//!
//! Every wait in CPython is one on a POSIX semaphore, because a signal ends it (on a condition SIGTERM would be heard when the wait
//! is over). But `sem_timedwait` waits for a date, and `sem_clockwait` came with glibc 2.30, while we are made for 2.17: set
//! the clock back by a day, and an agent stands still for a day. So these six functions are the program's own, taken by the
//! linker before the C library's. Named semaphores (sem_open) are not among them: nothing in the program has any.
//!
//! The value is the low half of one word and the number of threads that wait is the high half, as in glibc: a thread
//! that has posted never looks at the semaphore again, which another one may have freed by then.

use std::mem::size_of;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_long, c_uint, clockid_t, sem_t, timespec};

const ONE_WAITS: u64 = 1 << 32;
const _: () = assert!(size_of::<AtomicU64>() <= size_of::<sem_t>() && cfg!(target_endian = "little"));

fn value(state: u64) -> u32 {
    (state & u64::from(u32::MAX)) as u32
}

/// # Safety
/// `semaphore` has been through `sem_init`.
unsafe fn state<'a>(semaphore: *mut sem_t) -> &'a AtomicU64 {
    // SAFETY: as above; a sem_t is as large, and aligned like a long.
    unsafe { &*semaphore.cast::<AtomicU64>() }
}

fn failed(errno: c_int) -> c_int {
    // SAFETY: this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// futex(2) on the half of the word that holds the value. `until` is a moment of the monotonic clock; null is never.
fn futex(state: *const AtomicU64, operation: c_int, number: u32, until: *const timespec) -> Result<(), c_int> {
    let low = state.cast::<u32>();
    let (all, nobody): (c_uint, *const u32) = (c_uint::MAX, ptr::null());
    // SAFETY: the kernel looks at the word itself and refuses an address that is none.
    let done: c_long = unsafe {
        libc::syscall(libc::SYS_futex, low, operation | libc::FUTEX_PRIVATE_FLAG, number, until, nobody, all)
    };
    if done < 0 {
        // SAFETY: this thread's own.
        return Err(unsafe { *libc::__errno_location() });
    }
    Ok(())
}

fn taken(state: &AtomicU64, and: u64) -> bool {
    let take = |now: u64| (value(now) > 0).then(|| now - 1 - and);
    state.fetch_update(Ordering::Acquire, Ordering::Relaxed, take).is_ok()
}

fn wait(state: &AtomicU64, until: *const timespec) -> c_int {
    if taken(state, 0) {
        return 0;
    }
    state.fetch_add(ONE_WAITS, Ordering::Relaxed);
    loop {
        if taken(state, ONE_WAITS) {
            return 0;
        }
        match futex(state, libc::FUTEX_WAIT_BITSET, 0, until) {
            Ok(()) | Err(libc::EAGAIN) => {}
            Err(errno) => {
                state.fetch_sub(ONE_WAITS, Ordering::Relaxed);
                return failed(errno);
            }
        }
    }
}

fn now(clock: clockid_t) -> timespec {
    let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes one struct of ours.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now
}

/// `until` by the wall clock, as a moment of the monotonic one: the same time from now.
fn moved(until: &timespec) -> timespec {
    const SECOND: i64 = 1_000_000_000;
    let (wall, monotonic) = (now(libc::CLOCK_REALTIME), now(libc::CLOCK_MONOTONIC));
    let nanoseconds = until.tv_nsec - wall.tv_nsec + monotonic.tv_nsec;
    timespec {
        tv_sec: until
            .tv_sec
            .saturating_sub(wall.tv_sec)
            .saturating_add(monotonic.tv_sec)
            .saturating_add(nanoseconds.div_euclid(SECOND))
            .max(0),
        tv_nsec: nanoseconds.rem_euclid(SECOND),
    }
}

/// # Safety
/// As sem_init(3): memory for a semaphore. One that is shared between processes is refused.
#[no_mangle]
pub unsafe extern "C" fn sem_init(semaphore: *mut sem_t, shared: c_int, value: c_uint) -> c_int {
    if shared != 0 {
        return failed(libc::ENOSYS);
    }
    // SAFETY: the caller's memory, as large as a sem_t.
    unsafe { semaphore.cast::<AtomicU64>().write(AtomicU64::new(u64::from(value))) };
    0
}

/// # Safety
/// As sem_destroy(3).
#[no_mangle]
pub unsafe extern "C" fn sem_destroy(_semaphore: *mut sem_t) -> c_int {
    0
}

/// # Safety
/// As sem_post(3): a semaphore.
#[no_mangle]
pub unsafe extern "C" fn sem_post(semaphore: *mut sem_t) -> c_int {
    // SAFETY: the caller's semaphore.
    let before = unsafe { state(semaphore) }.fetch_add(1, Ordering::Release);
    if before >= ONE_WAITS {
        let _ = futex(semaphore.cast(), libc::FUTEX_WAKE, 1, ptr::null()); // it may be gone, and all who waited with it
    }
    0
}

/// # Safety
/// As sem_trywait(3): a semaphore.
#[no_mangle]
pub unsafe extern "C" fn sem_trywait(semaphore: *mut sem_t) -> c_int {
    // SAFETY: the caller's semaphore.
    if taken(unsafe { state(semaphore) }, 0) {
        0
    } else {
        failed(libc::EAGAIN)
    }
}

/// # Safety
/// As sem_wait(3): a semaphore.
#[no_mangle]
pub unsafe extern "C" fn sem_wait(semaphore: *mut sem_t) -> c_int {
    // SAFETY: the caller's semaphore.
    wait(unsafe { state(semaphore) }, ptr::null())
}

/// # Safety
/// As sem_timedwait(3): a semaphore and a date.
#[no_mangle]
pub unsafe extern "C" fn sem_timedwait(semaphore: *mut sem_t, until: *const timespec) -> c_int {
    // SAFETY: the caller's date.
    let moment = moved(unsafe { &*until });
    // SAFETY: the caller's semaphore.
    wait(unsafe { state(semaphore) }, &raw const moment)
}
