//! System calls that std and rustix do not wrap, and every `unsafe` of this crate.
//!
//! The faces are safe: messages are described by offsets into one buffer, and pointers exist only between filling
//! the kernel's structures and the return of the call that reads them.

use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// A piece of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub start: usize,
    pub len: usize,
}

/// A datagram to send, gathered from parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub to: Ipv4Addr,
    /// Which of the parts.
    pub parts: Range<usize>,
}

/// `sendmmsg`, with its structures kept between calls.
#[derive(Default)]
pub struct Sender {
    headers: Vec<libc::mmsghdr>,
    names: Vec<libc::sockaddr_in>,
    iovecs: Vec<libc::iovec>,
}

impl Sender {
    /// Sends `messages` to `port`, without waiting. Returns how many were taken, at least one; an error is about
    /// the first message.
    ///
    /// Panics if a part lies outside `buffer`.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        port: u16,
        buffer: &[u8],
        parts: &[Part],
        messages: &[Message],
    ) -> io::Result<usize> {
        self.iovecs.clear();
        self.iovecs.extend(parts.iter().map(|part| {
            let bytes = &buffer[part.start..part.start + part.len];
            libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            }
        }));
        self.names.clear();
        self.names
            .extend(messages.iter().map(|message| socket_address(message.to, port)));
        self.headers.clear();
        for (name, message) in self.names.iter_mut().zip(messages) {
            let iovecs = &mut self.iovecs[message.parts.clone()];
            let mut header = empty_header();
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = NAME_LEN;
            header.msg_hdr.msg_iov = iovecs.as_mut_ptr();
            header.msg_hdr.msg_iovlen = iovecs.len();
            self.headers.push(header);
        }
        let count = self.headers.len() as libc::c_uint;
        // SAFETY: `headers` holds `count` initialised entries; their pointers lead into `names` and `iovecs`, which
        // are not touched again before the call returns, and from there into `buffer`, borrowed for the call. The
        // kernel only reads through the iovecs.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// A datagram as received.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    pub source: Ipv4Addr,
    pub bytes: &'a [u8],
    /// It was longer than the slot; the rest is lost.
    pub truncated: bool,
}

/// `recvmmsg` into slots of one size, with its structures kept between calls.
pub struct Receiver {
    slot: usize,
    buffer: Box<[u8]>,
    headers: Vec<libc::mmsghdr>,
    names: Vec<libc::sockaddr_in>,
    iovecs: Vec<libc::iovec>,
}

impl Receiver {
    pub fn new(slots: usize, slot: usize) -> Self {
        Self {
            slot,
            buffer: vec![0; slots * slot].into(),
            headers: Vec::with_capacity(slots),
            names: vec![socket_address(Ipv4Addr::UNSPECIFIED, 0); slots],
            iovecs: Vec::with_capacity(slots),
        }
    }

    /// Fills slots with what is there, without waiting. Returns how many, at least one; `WouldBlock` if none.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.iovecs.clear();
        self.iovecs
            .extend(self.buffer.chunks_exact_mut(self.slot).map(|slot| libc::iovec {
                iov_base: slot.as_mut_ptr().cast(),
                iov_len: slot.len(),
            }));
        self.headers.clear();
        for (name, iovec) in self.names.iter_mut().zip(&mut self.iovecs) {
            let mut header = empty_header();
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = NAME_LEN;
            header.msg_hdr.msg_iov = iovec;
            header.msg_hdr.msg_iovlen = 1;
            self.headers.push(header);
        }
        let count = self.headers.len() as libc::c_uint;
        // SAFETY: `headers` holds `count` initialised entries; each points to its own name, its own iovec and by
        // that to its own slot of `buffer`. All of them belong to `self`, borrowed mutably for the call.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// What the last `receive` put into slot `at`.
    pub fn datagram(&self, at: usize) -> Datagram<'_> {
        let header = &self.headers[at];
        let length = (header.msg_len as usize).min(self.slot);
        Datagram {
            source: Ipv4Addr::from_bits(u32::from_be(self.names[at].sin_addr.s_addr)),
            bytes: &self.buffer[at * self.slot..][..length],
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        }
    }
}

const NAME_LEN: libc::socklen_t = mem::size_of::<libc::sockaddr_in>() as libc::socklen_t;

fn socket_address(address: Ipv4Addr, port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: address.to_bits().to_be(),
        },
        sin_zero: [0; 8],
    }
}

fn empty_header() -> libc::mmsghdr {
    // SAFETY: mmsghdr is a plain C structure (integers and pointers, padding on some targets) for which all zeros
    // is a valid value: no name, no parts, no control data.
    unsafe { mem::zeroed() }
}

/// What `TUNGETIFF` says about a descriptor: the device's flags, or None if it is not an attached TUN.
pub fn tun_flags(fd: BorrowedFd<'_>) -> Option<u32> {
    // _IOR('T', 210, unsigned int), see linux/if_tun.h; libc names it on some targets only.
    const TUNGETIFF: libc::Ioctl = 0x8004_54d2_u32 as libc::Ioctl;
    // SAFETY: ifreq is a plain C structure and union of integers and bytes; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, which `request` is; on anything but a TUN it fails without writing.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, ptr::from_mut(&mut request)) };
    // SAFETY: the kernel, or the zeroing above, initialised the whole union; flags are a plain integer.
    (status == 0).then(|| u32::from(unsafe { request.ifr_ifru.ifru_flags }.cast_unsigned()))
}

/// Asks for socket buffers of `bytes` in both directions, past the system's limits if we may (`CAP_NET_ADMIN`),
/// else up to them. Never fails: a smaller buffer only costs throughput.
pub fn grow_buffers(socket: BorrowedFd<'_>, bytes: i32) {
    for (forced, plain) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        let _ = set_option(socket, libc::SOL_SOCKET, forced, bytes)
            .or_else(|_| set_option(socket, libc::SOL_SOCKET, plain, bytes));
    }
}

fn set_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option value is read from `value`, an int that outlives the call, and its size is given.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            ptr::from_ref(&value).cast(),
            mem::size_of::<i32>() as libc::socklen_t,
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Runs `spawn` with every signal blocked, so that the thread it starts never takes one: signals belong to
/// Python's main thread. The caller's own mask is put back.
pub fn with_signals_blocked<T>(spawn: impl FnOnce() -> T) -> T {
    // SAFETY: sigset_t is a plain C structure; all zeros is a valid value, and sigfillset overwrites it.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { (mem::zeroed(), mem::zeroed()) };
    // SAFETY: both sets are valid and live on our stack; the calls touch only them and this thread's mask.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    let result = spawn();
    // SAFETY: `before` was filled by pthread_sigmask above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    result
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn gathered_messages_arrive_whole_with_their_sender() {
        let (from, to) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let port = to.local_addr().unwrap().port();
        let parts = [
            Part { start: 0, len: 5 },
            Part { start: 6, len: 5 },
            Part { start: 4, len: 0 },
        ];
        let to_us = |parts| Message {
            to: Ipv4Addr::LOCALHOST,
            parts,
        };
        let messages = [to_us(0..2), to_us(1..2), to_us(2..3)];
        let sent = Sender::default()
            .send(from.as_fd(), port, b"hello world", &parts, &messages)
            .unwrap();
        assert_eq!(sent, 3);

        let mut receiver = Receiver::new(8, 8);
        assert_eq!(receiver.receive(to.as_fd()).unwrap(), 3);
        let got = [0, 1, 2].map(|at| receiver.datagram(at));
        assert_eq!(
            got.map(|datagram| datagram.bytes),
            [&b"hellowor"[..], b"world", b""]
        );
        assert_eq!(got.map(|datagram| datagram.truncated), [true, false, false]);
        assert!(got.iter().all(|datagram| datagram.source == Ipv4Addr::LOCALHOST));
        assert_eq!(
            receiver.receive(to.as_fd()).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn a_socket_is_not_a_tun() {
        assert_eq!(tun_flags(UdpSocket::bind("127.0.0.1:0").unwrap().as_fd()), None);
    }

    #[test]
    fn buffers_grow_as_far_as_the_system_lets() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let before = rustix::net::sockopt::socket_recv_buffer_size(&socket).unwrap();
        grow_buffers(socket.as_fd(), 8 << 20);
        assert!(rustix::net::sockopt::socket_recv_buffer_size(&socket).unwrap() >= before);
    }

    #[test]
    fn signals_are_blocked_inside_and_only_there() {
        let blocked = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status
                .lines()
                .find(|line| line.starts_with("SigBlk:"))
                .unwrap()
                .to_owned();
            u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
        };
        let before = blocked();
        let term = 1 << (libc::SIGTERM - 1);
        assert_ne!(
            with_signals_blocked(|| std::thread::spawn(blocked).join().unwrap()) & term,
            0
        );
        assert_eq!(blocked(), before);
    }
}
