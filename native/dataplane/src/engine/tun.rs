//! The TUN's side: one packet, or super-packet, per read and per write.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::{Fatal, is_fatal};
use crate::coalesce::{Kinds, MAX_SEGMENTS};
use crate::virtio::{self, Header};

/// A TUN, or in tests one end of a `SOCK_SEQPACKET` or `SOCK_DGRAM` pair. Non-blocking. No packet is empty.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    /// Does a virtio header stand before each packet?
    headers: bool,
    kinds: Kinds,
}

/// What one read gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// With the length of the packet, which begins [`Tun::header_len`] bytes into the buffer.
    Packet(Header, usize),
    Nothing,
    /// The kernel threw this one away, or it is shorter than its own header.
    Lost,
}

/// Pieces of one write: the virtio header, a run's rewritten headers, payloads.
const PIECES: usize = 2 + MAX_SEGMENTS;

impl Tun {
    /// Packets go in and out whole.
    pub fn plain(fd: OwnedFd) -> Self {
        Self {
            fd,
            headers: false,
            kinds: Kinds::NONE,
        }
    }

    /// Packets have virtio headers; super-packets of these kinds may be written.
    pub fn with_headers(fd: OwnedFd, kinds: Kinds) -> Self {
        Self {
            fd,
            headers: true,
            kinds,
        }
    }

    /// Bytes before each packet in a read buffer.
    pub fn header_len(&self) -> usize {
        if self.headers { virtio::LEN } else { 0 }
    }

    /// The super-packets it takes.
    pub fn kinds(&self) -> Kinds {
        self.kinds
    }

    pub fn read(&self, into: &mut [u8]) -> Result<Read, Fatal> {
        let length = match rustix::io::read(&self.fd, &mut *into) {
            Ok(0) => return Err(Fatal::new("the TUN was closed", "read returned nothing")),
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Read::Nothing),
            Err(errno) if is_fatal(errno) => return Err(Fatal::new("the TUN failed in read", &errno)),
            Err(_) => return Ok(Read::Lost),
        };
        if !self.headers {
            return Ok(Read::Packet(Header::default(), length));
        }
        match into[..length].first_chunk() {
            Some(header) => Ok(Read::Packet(Header::parse(header), length - virtio::LEN)),
            None => Ok(Read::Lost),
        }
    }
}

/// Where packets are written to; the real one is [`Tun`], tests have one that fails on request.
pub trait Outlet {
    /// Does it take virtio headers, and by that unfinished checksums and super-packets?
    fn has_headers(&self) -> bool;

    /// Writes one packet made of `pieces`; `header` is left out where there are none.
    fn write<'a>(&self, header: Header, pieces: impl Iterator<Item = IoSlice<'a>>) -> Result<(), Errno>;
}

impl Outlet for Tun {
    fn has_headers(&self) -> bool {
        self.headers
    }

    fn write<'a>(&self, header: Header, pieces: impl Iterator<Item = IoSlice<'a>>) -> Result<(), Errno> {
        let header = header.format();
        let mut all: [IoSlice<'_>; PIECES] = std::array::from_fn(|_| IoSlice::new(&[]));
        all[0] = IoSlice::new(&header[..self.header_len()]);
        let mut count = 1;
        for (place, piece) in all[1..].iter_mut().zip(pieces) {
            *place = piece;
            count += 1;
        }
        rustix::io::writev(&self.fd, &all[..count]).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
