// Tests of packaging/executable/src/waits.rs; test_waits.py puts both into a crate.

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use libc::{c_int, sem_t, timespec};

    use crate::waits::{sem_destroy, sem_init, sem_post, sem_timedwait, sem_trywait, sem_wait};

    struct Semaphore(Box<MaybeUninit<sem_t>>);

    unsafe impl Send for Semaphore {}
    unsafe impl Sync for Semaphore {}

    impl Semaphore {
        fn new(value: u32) -> Self {
            let mut place = Box::new(MaybeUninit::uninit());
            assert_eq!(unsafe { sem_init(place.as_mut_ptr(), 0, value) }, 0);
            Self(place)
        }

        fn at(&self) -> *mut sem_t {
            self.0.as_ptr().cast_mut()
        }

        fn post(&self) {
            assert_eq!(unsafe { sem_post(self.at()) }, 0);
        }

        fn wait(&self) -> Result<(), c_int> {
            told(unsafe { sem_wait(self.at()) })
        }

        fn try_wait(&self) -> Result<(), c_int> {
            told(unsafe { sem_trywait(self.at()) })
        }

        fn wait_for(&self, time: Duration) -> Result<(), c_int> {
            let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
            unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
            let nanoseconds = now.tv_nsec + i64::from(time.subsec_nanos());
            let until = timespec {
                tv_sec: now.tv_sec + time.as_secs() as i64 + nanoseconds / 1_000_000_000,
                tv_nsec: nanoseconds % 1_000_000_000,
            };
            told(unsafe { sem_timedwait(self.at(), &raw const until) })
        }
    }

    impl Drop for Semaphore {
        fn drop(&mut self) {
            assert_eq!(unsafe { sem_destroy(self.at()) }, 0);
        }
    }

    fn told(result: c_int) -> Result<(), c_int> {
        if result == 0 {
            Ok(())
        } else {
            Err(unsafe { *libc::__errno_location() })
        }
    }

    #[test]
    fn it_counts() {
        let semaphore = Semaphore::new(2);
        assert_eq!(semaphore.try_wait(), Ok(()));
        assert_eq!(semaphore.wait(), Ok(()));
        assert_eq!(semaphore.try_wait(), Err(libc::EAGAIN));
        semaphore.post();
        assert_eq!(semaphore.wait_for(Duration::ZERO), Ok(()));
    }

    #[test]
    fn one_between_processes_is_refused() {
        let mut place = MaybeUninit::uninit();
        assert_eq!(told(unsafe { sem_init(place.as_mut_ptr(), 1, 0) }), Err(libc::ENOSYS));
    }

    #[test]
    fn a_wait_ends_in_its_time_and_no_earlier() {
        let semaphore = Semaphore::new(0);
        for time in [Duration::ZERO, Duration::from_millis(70), Duration::from_nanos(1_999_999)] {
            let began = Instant::now();
            assert_eq!(semaphore.wait_for(time), Err(libc::ETIMEDOUT));
            assert!(began.elapsed() >= time, "{:?} of {time:?}", began.elapsed());
        }
        semaphore.post();
        assert_eq!(semaphore.try_wait(), Ok(()));
    }

    #[test]
    fn a_signal_ends_a_wait() {
        extern "C" fn nothing(_: c_int) {}
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
        assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
        let semaphore = Arc::new(Semaphore::new(0));
        for for_ever in [true, false] {
            let ended = Arc::new(AtomicBool::new(false));
            let id = Arc::new(AtomicU64::new(0));
            let waiting = {
                let (semaphore, ended, id) = (semaphore.clone(), ended.clone(), id.clone());
                thread::spawn(move || {
                    id.store(unsafe { libc::pthread_self() }, Ordering::SeqCst);
                    let result = if for_ever { semaphore.wait() } else { semaphore.wait_for(Duration::from_secs(60)) };
                    ended.store(true, Ordering::SeqCst);
                    result
                })
            };
            let deadline = Instant::now() + Duration::from_secs(30);
            while !ended.load(Ordering::SeqCst) {
                assert!(Instant::now() < deadline);
                let thread = id.load(Ordering::SeqCst);
                if thread != 0 {
                    unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                }
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(waiting.join().unwrap(), Err(libc::EINTR));
        }
        semaphore.post();
        assert_eq!(semaphore.try_wait(), Ok(()));
    }

    /// Nothing posted is lost and nothing is taken twice, whoever waits, gives up or only tries meanwhile.
    #[test]
    fn many_threads_take_what_many_threads_post() {
        const EACH: u64 = 50_000;
        let semaphore = Arc::new(Semaphore::new(0));
        let (taken, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let takers: Vec<_> = (0..6)
            .map(|number| {
                let (semaphore, taken, over) = (semaphore.clone(), taken.clone(), over.clone());
                thread::spawn(move || {
                    while !over.load(Ordering::SeqCst) {
                        let got = match number % 3 {
                            0 => semaphore.try_wait(),
                            1 => semaphore.wait_for(Duration::from_micros(50)),
                            _ => semaphore.wait_for(Duration::from_secs(60)),
                        };
                        if got.is_ok() && taken.fetch_add(1, Ordering::SeqCst) + 1 >= 3 * EACH {
                            over.store(true, Ordering::SeqCst);
                            for _ in 0..6 {
                                semaphore.post(); // for who still waits
                            }
                        }
                    }
                })
            })
            .collect();
        let givers: Vec<_> = (0..3)
            .map(|_| {
                let semaphore = semaphore.clone();
                thread::spawn(move || (0..EACH).for_each(|_| semaphore.post()))
            })
            .collect();
        for one in givers.into_iter().chain(takers) {
            one.join().unwrap();
        }
        assert!((3 * EACH..=3 * EACH + 6).contains(&taken.load(Ordering::SeqCst)));
    }

    /// As CPython uses it: a lock that is freed by whoever took it last, while the one before has hardly let go.
    #[test]
    fn a_lock_is_held_by_one_and_may_be_freed_at_once() {
        for _ in 0..300 {
            let lock = Arc::new(Semaphore::new(1));
            let held = Arc::new(AtomicU64::new(0));
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (lock, held) = (lock.clone(), held.clone());
                    thread::spawn(move || {
                        for _ in 0..100 {
                            assert_eq!(lock.wait_for(Duration::from_secs(60)), Ok(()));
                            assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0);
                            held.fetch_sub(1, Ordering::SeqCst);
                            lock.post();
                        }
                    })
                })
                .collect();
            for one in threads {
                one.join().unwrap();
            }
        }
    }
}
