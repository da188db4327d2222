//! The loop: wait, then serve both directions in bounded bursts until neither has anything left.
//!
//! One thread on purpose: two gave 0.85 to 1.28 times as much over several runs on two cores, which is noise, and
//! several writers reorder a flow.

mod bucket;
mod receive;
mod transmit;
mod tun;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::counters::{Counters, Tally};
use crate::forward::Rules;
use crate::offload::{Levels, Offload};
use crate::routes::Routes;
use crate::sys;
use crate::traffic::Peers;
pub use receive::Receive;
pub use transmit::{Transmit, Underlay};
pub use tun::Tun;

/// What the worker and its owner both see.
#[derive(Debug)]
pub struct Shared {
    pub routes: ArcSwap<Routes>,
    pub counters: Counters,
    pub peers: Peers,
    pub levels: Levels,
    pub stop: AtomicBool,
    /// An eventfd: written to wake the worker up for `stop`.
    pub wake: OwnedFd,
}

/// Everything the worker owns.
#[derive(Debug)]
pub struct Engine {
    pub tun: Tun,
    pub udp: OwnedFd,
    /// How many packets the kernel takes in one message.
    pub segments: usize,
    pub port: u16,
    pub rules: Rules,
}

/// Rounds between two looks at the stop flag by way of `poll`: a busy worker still ends at once, because the flag
/// itself is read every round; this bound is for hang-ups, which only `poll` tells.
const ROUNDS: usize = 64;

impl Engine {
    /// Runs until `shared.stop`, or until a descriptor fails for good: then the text says which and why.
    pub fn run(self, shared: &Shared) -> Result<(), String> {
        let mut transmit = Transmit::new(self.segments);
        let mut receive = Receive::new(self.tun.kinds());
        let mut underlay = transmit::UdpSocket::new(self.udp.as_fd(), self.port);
        let mut tally = Tally::default();
        let mut stalled = false;
        sys::raise_priority();
        loop {
            let ready =
                wait(&shared.wake, self.tun.as_fd(), self.udp.as_fd()).map_err(|e| format!("poll: {e}"))?;
            if shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            let mut served = false;
            for _ in 0..ROUNDS {
                let routes = shared.routes.load();
                let received = receive
                    .round(&self.udp, &self.tun, &routes, &self.rules, &mut tally)
                    .map_err(|e| e.to_string());
                let both = received.and_then(|received| {
                    let sent = transmit.round(&self.tun, &mut underlay, &routes, &self.rules, &mut tally);
                    sent.map(|sent| sent.max(received)).map_err(|e| e.to_string())
                });
                shared.counters.publish(&mut tally);
                shared.peers.publish(&mut tally.peers, Instant::now());
                if let Some(errno) = transmit.given_up() {
                    shared.levels.off(Offload::Gso, refused(errno));
                }
                if receive.given_up() {
                    for offload in [Offload::Tso, Offload::Uso] {
                        shared
                            .levels
                            .off(offload, "the TUN refused super-packets it should take (EINVAL)");
                    }
                }
                let both = both?;
                served |= both != Served::Nothing;
                if both != Served::More || shared.stop.load(Ordering::Acquire) {
                    break;
                }
            }
            // A device that is gone keeps poll returning and read saying "nothing there": do not spin on it. One
            // more look, because the error may have come between.
            let hung_up = ready
                .tun
                .intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
            if !served && hung_up && stalled {
                return Err(format!("the TUN hung up ({:?})", ready.tun));
            }
            stalled = !served && hung_up;
        }
    }
}

/// What a burst found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Served {
    Nothing,
    /// Something, and then nothing more.
    Drained,
    /// Something, and there may be more.
    More,
}

/// Why the kernel is no longer given groups of packets.
fn refused(errno: Errno) -> String {
    let why = match errno {
        Errno::IO => "the outgoing device computes no checksums, or IPsec covers a route",
        _ => "no group was ever taken",
    };
    format!("{why} ({errno})")
}

struct Ready {
    tun: PollFlags,
}

fn wait(wake: &OwnedFd, tun: BorrowedFd<'_>, udp: BorrowedFd<'_>) -> io::Result<Ready> {
    let mut fds = [
        PollFd::new(wake, PollFlags::IN),
        PollFd::new(&tun, PollFlags::IN),
        PollFd::new(&udp, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => {
                return Ok(Ready {
                    tun: fds[1].revents(),
                });
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A descriptor that will never work again.
#[derive(Debug, PartialEq, Eq)]
pub struct Fatal {
    what: &'static str,
    why: String,
}

impl Fatal {
    fn new(what: &'static str, why: &(impl ToString + ?Sized)) -> Self {
        Self {
            what,
            why: why.to_string(),
        }
    }
}

impl std::fmt::Display for Fatal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// Errors after which a descriptor is of no use: closed, device deleted, or (in tests) the other end of the
/// socketpair gone. Every other errno concerns one packet.
fn is_fatal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::BADF
            | Errno::BADFD
            | Errno::NODEV
            | Errno::NXIO
            | Errno::NOTSOCK
            | Errno::PIPE
            | Errno::CONNRESET
            | Errno::NOTCONN
    )
}
