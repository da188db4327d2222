//! The TUN's side: one packet per read, one per write.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::{Fatal, is_fatal};
use crate::counters::{Reason, Tally};

/// A TUN, or in tests one end of a `SOCK_SEQPACKET` or `SOCK_DGRAM` pair. Non-blocking. No packet is empty.
#[derive(Debug)]
pub struct Tun(OwnedFd);

/// What one read gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    Packet(usize),
    Nothing,
    /// The kernel threw this one away.
    Lost,
}

impl Tun {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub fn read(&self, into: &mut [u8]) -> Result<Read, Fatal> {
        match rustix::io::read(&self.0, into) {
            Ok(0) => Err(Fatal::new("the TUN was closed", "read returned nothing")),
            Ok(length) => Ok(Read::Packet(length)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Read::Nothing),
            Err(errno) if is_fatal(errno) => Err(Fatal::new("the TUN failed in read", &errno)),
            Err(_) => Ok(Read::Lost),
        }
    }

    /// True if the packet was taken; else it is counted.
    pub fn write(&self, packet: &[u8], tally: &mut Tally) -> Result<bool, Fatal> {
        match rustix::io::write(&self.0, packet) {
            Ok(_) => return Ok(true),
            Err(Errno::AGAIN | Errno::NOBUFS) => tally.drop(Reason::QueueFull),
            Err(errno) if is_fatal(errno) => return Err(Fatal::new("the TUN failed in write", &errno)),
            Err(_) => tally.drop(Reason::TunError),
        }
        Ok(false)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
