//! The worker thread and the handle to it.

use std::any::Any;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::counters::Counters;
use crate::engine::{Engine, Shared, Tun};
use crate::forward::{PeerCheck, Rules};
use crate::offload::{self, Allowed, Level, Offload};
use crate::routes::{Route, Routes, Subnet};
use crate::sys;
use crate::traffic::{Peers, Traffic};
use crate::virtio;

/// Bytes asked for in each direction of the underlay's socket. With the default buffer, 75,000 retransmissions in
/// two seconds of one TCP stream were measured.
const SOCKET_BUFFER: i32 = 8 << 20;

/// The TUN MTU's limits: what every IPv4 link carries (RFC 791), and what fits a UDP datagram.
const MTU: std::ops::RangeInclusive<usize> = 68..=65_507;

/// Why something was refused.
#[derive(Debug)]
pub enum Error {
    /// An argument makes no sense.
    Invalid(String),
    /// A descriptor is not what it should be, or the kernel refused.
    Os(String, io::Error),
    /// `start` after `start` or `stop`.
    State(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(text) => f.write_str(text),
            Self::Os(what, error) => write!(f, "{what}: {error}"),
            Self::State(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// How a data plane shall work.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The TUN's, in bytes.
    pub mtu: usize,
    pub own: Subnet,
    /// Where peers listen.
    pub port: u16,
    pub peer_check: PeerCheck,
    /// What the kernel may be asked to do in bulk.
    pub offloads: Allowed,
}

/// One TUN, one socket, one worker. NEW → RUNNING → ENDED; there is no way back.
#[derive(Debug)]
pub struct DataPlane {
    shared: Arc<Shared>,
    life: Arc<Life>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Life {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
enum State {
    New(Box<Engine>),
    Running,
    /// With the reason if it ended by itself.
    Ended(Option<String>),
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(&self.state)
    }

    fn end(&self, failure: Option<String>) {
        *self.lock() = State::Ended(failure);
        self.ended.notify_all();
    }
}

impl DataPlane {
    /// Looks at both descriptors and keeps duplicates. The TUN becomes non-blocking, for its caller as well.
    pub fn new(tun: BorrowedFd<'_>, udp: BorrowedFd<'_>, settings: Settings) -> Result<Self, Error> {
        if !MTU.contains(&settings.mtu) {
            let text = format!(
                "MTU {} is not between {} and {}",
                settings.mtu,
                MTU.start(),
                MTU.end()
            );
            return Err(Error::Invalid(text));
        }
        if settings.port == 0 {
            return Err(Error::Invalid("port 0 is where nobody listens".to_owned()));
        }
        let (tun, udp) = (open_tun(tun)?, open_udp(udp)?);
        let asked = sys::Descriptors {
            tun: tun.real.then(|| tun.fd.as_fd()),
            udp: udp.as_fd(),
        };
        let found = offload::probe(&asked, tun.headers, settings.offloads)
            .map_err(|error| Error::Os("tun_fd keeps its offloads".to_owned(), error))?;
        let tun = if tun.headers {
            Tun::with_headers(tun.fd, found.kinds)
        } else {
            Tun::plain(tun.fd)
        };
        let rules = Rules {
            own: settings.own,
            mtu: settings.mtu,
            peer_check: settings.peer_check,
        };
        let engine = Engine {
            tun,
            udp,
            segments: found.segments,
            port: settings.port,
            rules,
        };
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::Os("eventfd".to_owned(), errno.into()))?;
        let shared = Shared {
            routes: ArcSwap::from_pointee(Routes::default()),
            counters: Counters::default(),
            peers: Peers::default(),
            levels: found.levels,
            stop: AtomicBool::new(false),
            wake,
        };
        let life = Life {
            state: Mutex::new(State::New(Box::new(engine))),
            ended: Condvar::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            life: Arc::new(life),
            thread: Mutex::new(None),
        })
    }

    /// Starts the worker, with every signal blocked in it.
    pub fn start(&self) -> Result<(), Error> {
        let mut state = self.life.lock();
        let engine = match std::mem::replace(&mut *state, State::Running) {
            State::New(engine) => engine,
            State::Running => return Err(Error::State("the data plane was started before")),
            ended @ State::Ended(_) => {
                *state = ended;
                return Err(Error::State(
                    "the data plane has ended and cannot be started again",
                ));
            }
        };
        drop(state);
        let (shared, life) = (Arc::clone(&self.shared), Arc::clone(&self.life));
        let worker = move || {
            let failure = match catch_unwind(AssertUnwindSafe(|| engine.run(&shared))) {
                Ok(result) => result.err(),
                Err(panic) => Some(format!("the worker panicked: {}", panic_text(&*panic))),
            };
            life.end(failure);
        };
        let spawned = sys::with_signals_blocked(|| {
            thread::Builder::new()
                .name("flanctl-data".to_owned())
                .spawn(worker)
        });
        match spawned {
            Ok(thread) => *unpoisoned(&self.thread) = Some(thread),
            Err(error) => {
                self.life.end(Some(format!("no thread: {error}")));
                return Err(Error::Os("starting the worker".to_owned(), error));
            }
        }
        Ok(())
    }

    /// Replaces the whole table. False if it is the same as before.
    pub fn replace_routes(&self, routes: impl IntoIterator<Item = Route>) -> Result<bool, Error> {
        let routes = Routes::new(routes).map_err(Error::Invalid)?;
        if **self.shared.routes.load() == routes {
            return Ok(false);
        }
        let routes = Arc::new(routes);
        self.shared.routes.store(Arc::clone(&routes));
        // A burst under the old table may still add a peer that has left; it goes with the next table.
        self.shared.peers.retain(|peer| routes.is_peer(peer));
        Ok(true)
    }

    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Traffic by peer, of those that had any.
    pub fn peers(&self) -> Vec<(Ipv4Addr, Traffic)> {
        self.shared.peers.read()
    }

    /// What the kernel does in bulk now, and why not.
    pub fn offload(&self, offload: Offload) -> Level {
        self.shared.levels.get(offload)
    }

    /// Why the worker ended by itself.
    pub fn failure(&self) -> Option<String> {
        match &*self.life.lock() {
            State::Ended(failure) => failure.clone(),
            State::New(_) | State::Running => None,
        }
    }

    /// Blocks until the worker has ended, for `timeout` at most. True if it has.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.life.lock();
        while !matches!(*state, State::Ended(_)) {
            let left = deadline.map_or(Duration::MAX, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return false;
            }
            state = self
                .life
                .ended
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Asks the worker to end and waits for it, `timeout` at most. As often as you like.
    pub fn stop(&self, timeout: Duration) -> bool {
        self.shared.stop.store(true, Ordering::Release);
        // It can only fail when the counter is full, and then the worker is awake anyway.
        let _ = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes());
        let mut state = self.life.lock();
        if matches!(*state, State::New(_)) {
            *state = State::Ended(None);
            self.life.ended.notify_all();
        }
        drop(state);
        let ended = self.wait(timeout);
        if ended {
            // It has nothing left to do but exit; after this no descriptor of ours is open in it.
            let thread = unpoisoned(&self.thread).take();
            drop(thread.map(JoinHandle::join));
        }
        ended
    }
}

impl Drop for DataPlane {
    /// The worker ends by itself soon; its descriptors close with it.
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

/// What our mutexes hold is replaced in one assignment, so it is whole even if a holder panicked.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

fn duplicate(fd: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Error> {
    fd.try_clone_to_owned()
        .map_err(|error| Error::Os(format!("{name} cannot be duplicated"), error))
}

fn wrong(name: &str, text: &str) -> Error {
    Error::Os(format!("{name} {text}"), rustix::io::Errno::INVAL.into())
}

/// A duplicate, and what it is.
struct OpenTun {
    fd: OwnedFd,
    /// Not a socketpair.
    real: bool,
    headers: bool,
}

fn open_tun(fd: BorrowedFd<'_>) -> Result<OpenTun, Error> {
    let owned = duplicate(fd, "tun_fd")?;
    let nonblocking = rustix::fs::fcntl_getfl(&owned)
        .and_then(|flags| rustix::fs::fcntl_setfl(&owned, flags | OFlags::NONBLOCK));
    nonblocking.map_err(|errno| Error::Os("tun_fd cannot be made non-blocking".to_owned(), errno.into()))?;
    if let Some(flags) = sys::tun_flags(fd) {
        let has = |flag: libc::c_int| flags & flag.cast_unsigned() != 0;
        if !has(libc::IFF_TUN) || !has(libc::IFF_NO_PI) {
            return Err(wrong("tun_fd", "is not a TUN opened with IFF_TUN and IFF_NO_PI"));
        }
        let headers = has(libc::IFF_VNET_HDR);
        if headers {
            sys::set_virtio_header_len(fd, virtio::LEN)
                .map_err(|error| Error::Os("tun_fd takes no virtio headers of 10 bytes".to_owned(), error))?;
        }
        return Ok(OpenTun {
            fd: owned,
            real: true,
            headers,
        });
    }
    let pair = sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && matches!(
            sockopt::socket_type(fd),
            Ok(SocketType::SEQPACKET | SocketType::DGRAM)
        );
    if pair {
        Ok(OpenTun {
            fd: owned,
            real: false,
            headers: false,
        })
    } else {
        Err(wrong(
            "tun_fd",
            "is neither an attached TUN nor a SEQPACKET or DGRAM socketpair",
        ))
    }
}

fn open_udp(fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    let owned = duplicate(fd, "udp_fd")?;
    let kind = sockopt::socket_domain(fd).and_then(|domain| Ok((domain, sockopt::socket_type(fd)?)));
    let kind = kind.map_err(|errno| Error::Os("udp_fd is no socket".to_owned(), errno.into()))?;
    if kind != (AddressFamily::INET, SocketType::DGRAM) {
        return Err(wrong("udp_fd", "is not a UDP/IPv4 socket"));
    }
    let bound = rustix::net::getsockname(fd)
        .ok()
        .and_then(|address| std::net::SocketAddrV4::try_from(address).ok());
    if bound.is_none_or(|address| address.port() == 0) {
        return Err(wrong("udp_fd", "is not bound to a port"));
    }
    sys::grow_buffers(fd, SOCKET_BUFFER);
    Ok(owned)
}
