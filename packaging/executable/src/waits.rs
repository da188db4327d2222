//! Waits that do not follow the wall clock.
//!
//! Every wait with a time-out in CPython ends in `sem_timedwait`, where the C library it was compiled for has no
//! `sem_clockwait` (glibc before 2.30; we compile for 2.17). That one waits until a date: set the clock back a day, and
//! an agent stands still for a day. So the program has a `sem_timedwait` of its own, which the linker takes before the
//! library's: it counts the time on the monotonic clock where the library of the machine it runs on can.

use std::sync::OnceLock;

use libc::{c_int, clockid_t, sem_t, timespec};

type Until = unsafe extern "C" fn(*mut sem_t, *const timespec) -> c_int;
type UntilOf = unsafe extern "C" fn(*mut sem_t, clockid_t, *const timespec) -> c_int;

#[derive(Clone, Copy)]
enum Wait {
    Monotonic(UntilOf),
    /// As before: the date is all this library knows.
    Wall(Until),
    Neither,
}

static WAIT: OnceLock<Wait> = OnceLock::new();

fn found() -> Wait {
    // SAFETY: names of the C library, whose types are as above (semaphore.h).
    unsafe {
        let monotonic = libc::dlsym(libc::RTLD_DEFAULT, c"sem_clockwait".as_ptr());
        if !monotonic.is_null() {
            return Wait::Monotonic(std::mem::transmute::<*mut libc::c_void, UntilOf>(monotonic));
        }
        let wall = libc::dlsym(libc::RTLD_NEXT, c"sem_timedwait".as_ptr());
        if wall.is_null() {
            return Wait::Neither;
        }
        Wait::Wall(std::mem::transmute::<*mut libc::c_void, Until>(wall))
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
/// As sem_timedwait(3): a semaphore and a date.
#[no_mangle]
pub unsafe extern "C" fn sem_timedwait(semaphore: *mut sem_t, until: *const timespec) -> c_int {
    match *WAIT.get_or_init(found) {
        Wait::Monotonic(wait) => {
            // SAFETY: the caller's date.
            let moment = moved(unsafe { &*until });
            // SAFETY: the caller's semaphore; a moment of ours.
            unsafe { wait(semaphore, libc::CLOCK_MONOTONIC, &raw const moment) }
        }
        // SAFETY: as the caller gave them.
        Wait::Wall(wait) => unsafe { wait(semaphore, until) },
        Wait::Neither => {
            // SAFETY: this thread's own.
            unsafe { *libc::__errno_location() = libc::ENOSYS };
            -1
        }
    }
}
