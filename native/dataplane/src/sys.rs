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

use crate::checksum::{self, Sum};
use crate::coalesce::Kinds;
use crate::offload;

/// A piece of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub start: usize,
    pub len: usize,
}

impl Part {
    pub fn of(self, buffer: &[u8]) -> &[u8] {
        &buffer[self.start..self.start + self.len]
    }

    /// Cut into pieces of `size` bytes, the last as long as it comes. An empty part is one empty piece.
    pub fn pieces(self, size: usize) -> impl Iterator<Item = Self> {
        let size = size.max(1);
        let count = self.len.div_ceil(size).max(1);
        (0..count).map(move |n| Self {
            start: self.start + n * size,
            len: size.min(self.len - n * size),
        })
    }
}

/// A datagram to send, gathered from parts; or several, if they are longer than `segment_size`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub to: Ipv4Addr,
    /// Which of the parts.
    pub parts: Range<usize>,
    /// Bytes of each datagram; only the last may be shorter. A single datagram's own length, then.
    pub segment_size: u16,
}

/// A control message with one value behind its header, laid out as `CMSG_DATA` would find it: `CMSG_ALIGN` of the
/// header's size is the header's size, and the value's alignment is no larger than the header's.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control<T> {
    header: libc::cmsghdr,
    value: T,
}

impl<T> Control<T> {
    /// `CMSG_LEN` of the value.
    const LEN: usize = mem::size_of::<libc::cmsghdr>() + mem::size_of::<T>();
    /// `CMSG_SPACE` of the value.
    const SPACE: usize = mem::size_of::<Self>();

    fn new(kind: libc::c_int, value: T) -> Self {
        // SAFETY: cmsghdr is a plain C structure of integers (padding on some targets); all zeros is valid.
        let mut header: libc::cmsghdr = unsafe { mem::zeroed() };
        header.cmsg_len = Self::LEN as _; // size_t here, socklen_t in musl
        header.cmsg_level = libc::SOL_UDP;
        header.cmsg_type = kind;
        Self { header, value }
    }
}

/// `sendmmsg`, with its structures kept between calls.
#[derive(Default)]
pub struct Sender {
    headers: Vec<libc::mmsghdr>,
    names: Vec<libc::sockaddr_in>,
    iovecs: Vec<libc::iovec>,
    controls: Vec<Control<u16>>,
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
            let bytes = part.of(buffer);
            libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            }
        }));
        self.names.clear();
        self.names
            .extend(messages.iter().map(|message| socket_address(message.to, port)));
        self.controls.clear();
        self.controls.extend(
            messages
                .iter()
                .map(|one| Control::new(libc::UDP_SEGMENT, one.segment_size)),
        );
        self.headers.clear();
        for ((name, control), message) in self.names.iter_mut().zip(&mut self.controls).zip(messages) {
            let iovecs = &mut self.iovecs[message.parts.clone()];
            let mut header = empty_header();
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = NAME_LEN;
            header.msg_hdr.msg_iov = iovecs.as_mut_ptr();
            header.msg_hdr.msg_iovlen = iovecs.len() as _;
            let bytes: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
            if bytes > usize::from(message.segment_size) {
                header.msg_hdr.msg_control = ptr::from_mut(control).cast();
                header.msg_hdr.msg_controllen = Control::<u16>::SPACE as _;
            }
            self.headers.push(header);
        }
        let count = self.headers.len() as libc::c_uint;
        // SAFETY: `headers` holds `count` initialised entries; their pointers lead into `names`, `controls` and
        // `iovecs`, which are not touched again before the call returns, and from there into `buffer`, borrowed for
        // the call. The kernel only reads through the iovecs.
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

/// A datagram as received, or several of one sender that the kernel merged (`UDP_GRO`).
#[derive(Debug, Clone, Copy)]
pub struct Datagram {
    pub source: Ipv4Addr,
    /// Of the receiver's buffer.
    pub part: Part,
    /// Bytes of each datagram; only the last may be shorter. Never zero.
    pub segment_size: usize,
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
    controls: Vec<Control<libc::c_int>>,
}

impl Receiver {
    pub fn new(slots: usize, slot: usize) -> Self {
        Self {
            slot,
            buffer: vec![0; slots * slot].into(),
            headers: Vec::with_capacity(slots),
            names: vec![socket_address(Ipv4Addr::UNSPECIFIED, 0); slots],
            iovecs: Vec::with_capacity(slots),
            controls: vec![Control::new(0, 0); slots],
        }
    }

    /// Fills up to `slots` slots with what is there, without waiting. Returns how many, at least one; `WouldBlock`
    /// if none.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, slots: usize) -> io::Result<usize> {
        self.iovecs.clear();
        self.iovecs.extend(
            self.buffer
                .chunks_exact_mut(self.slot)
                .take(slots)
                .map(|slot| libc::iovec {
                    iov_base: slot.as_mut_ptr().cast(),
                    iov_len: slot.len(),
                }),
        );
        self.headers.clear();
        for ((name, control), iovec) in self
            .names
            .iter_mut()
            .zip(&mut self.controls)
            .zip(&mut self.iovecs)
        {
            let mut header = empty_header();
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = NAME_LEN;
            header.msg_hdr.msg_iov = iovec;
            header.msg_hdr.msg_iovlen = 1;
            *control = Control::new(0, 0);
            header.msg_hdr.msg_control = ptr::from_mut(control).cast();
            header.msg_hdr.msg_controllen = Control::<libc::c_int>::SPACE as _;
            self.headers.push(header);
        }
        let count = self.headers.len() as libc::c_uint;
        // SAFETY: `headers` holds `count` initialised entries; each points to its own name, its own control message
        // (any bytes are a valid value of it), its own iovec and by that to its own slot of `buffer`. All of them
        // belong to `self`, borrowed mutably for the call.
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

    /// What all parts are parts of.
    pub fn buffer(&self) -> &[u8] {
        &self.buffer
    }

    /// What the last `receive` put into slot `at`.
    pub fn datagram(&self, at: usize) -> Datagram {
        let header = &self.headers[at];
        let len = (header.msg_len as usize).min(self.slot);
        Datagram {
            source: Ipv4Addr::from_bits(u32::from_be(self.names[at].sin_addr.s_addr)),
            part: Part {
                start: at * self.slot,
                len,
            },
            segment_size: self.segment_size(at).unwrap_or(len).max(1),
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        }
    }

    /// What `UDP_GRO` says, if it says anything.
    fn segment_size(&self, at: usize) -> Option<usize> {
        let (header, control) = (&self.headers[at].msg_hdr, &self.controls[at]);
        let told = header.msg_controllen >= Control::<libc::c_int>::LEN
            && control.header.cmsg_level == libc::SOL_UDP
            && control.header.cmsg_type == libc::UDP_GRO;
        told.then(|| usize::try_from(control.value).ok()).flatten()
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

// linux/if_tun.h; libc names them on some targets only.
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as libc::Ioctl; // _IOW('T', 208, unsigned int)
const TUNGETIFF: libc::Ioctl = 0x8004_54d2_u32 as libc::Ioctl; // _IOR('T', 210, unsigned int)
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8_u32 as libc::Ioctl; // _IOW('T', 216, int)
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// The two descriptors of a data plane, as the probe asks them.
pub struct Descriptors<'fd> {
    /// None: a socketpair stands in for the TUN.
    pub tun: Option<BorrowedFd<'fd>>,
    pub udp: BorrowedFd<'fd>,
}

impl offload::System for Descriptors<'_> {
    fn offload_tun(&self, kinds: Kinds) -> io::Result<()> {
        self.tun.map_or(Ok(()), |tun| set_tun_offload(tun, kinds))
    }

    fn segment(&self) -> io::Result<()> {
        set_option(self.udp, libc::SOL_UDP, libc::UDP_SEGMENT, 0)
    }

    fn merge(&self, on: bool) -> io::Result<()> {
        set_option(self.udp, libc::SOL_UDP, libc::UDP_GRO, on.into())
    }

    fn version(&self) -> (u32, u32) {
        kernel_version()
    }
}

/// What `TUNGETIFF` says about a descriptor: the device's flags, or None if it is not an attached TUN.
pub fn tun_flags(fd: BorrowedFd<'_>) -> Option<u32> {
    // SAFETY: ifreq is a plain C structure and union of integers and bytes; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, which `request` is; on anything but a TUN it fails without writing.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, ptr::from_mut(&mut request)) };
    // SAFETY: the kernel, or the zeroing above, initialised the whole union; flags are a plain integer.
    (status == 0).then(|| u32::from(unsafe { request.ifr_ifru.ifru_flags }.cast_unsigned()))
}

/// Tells the kernel which super-packets it may hand over by this TUN, and unfinished checksums if any. EINVAL means that
/// it does not know all of it. UDP's are Linux 6.2, and only for both IP versions at once.
fn set_tun_offload(fd: BorrowedFd<'_>, kinds: Kinds) -> io::Result<()> {
    let mut bits = 0;
    if kinds.tcp {
        bits |= TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN;
    }
    if kinds.udp {
        bits |= TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6;
    }
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, bits) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets how many bytes `virtio_net_hdr` has on this TUN.
pub fn set_virtio_header_len(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = libc::c_int::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, ptr::from_ref(&len)) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn kernel_version() -> (u32, u32) {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
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

/// [`checksum::lanes`], with the widest instructions this processor has.
pub fn wide_sum(bytes: &[u8]) -> Sum {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the function asks for nothing but AVX2, which the processor was just found to have.
        return unsafe { sum_with_avx2(bytes) };
    }
    checksum::lanes(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_with_avx2(bytes: &[u8]) -> Sum {
    checksum::lanes(bytes)
}

/// Asks for the calling thread to run before ordinary ones. The kernel carries packets in softirqs, before any process; a
/// machine busy with its containers should not make ours wait for these. Refused without `CAP_SYS_NICE`, which only costs
/// latency.
pub fn raise_priority() {
    // SAFETY: setpriority takes its arguments by value. PRIO_PROCESS with 0 is the calling thread (setpriority(2)).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// Far from the most urgent (-20), well before the default.
const NICE: libc::c_int = -10;

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
    use crate::offload::System;

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
            segment_size: 100,
        };
        let messages = [to_us(0..2), to_us(1..2), to_us(2..3)];
        let sent = Sender::default()
            .send(from.as_fd(), port, b"hello world", &parts, &messages)
            .unwrap();
        assert_eq!(sent, 3);

        let mut receiver = Receiver::new(8, 8);
        assert_eq!(receiver.receive(to.as_fd(), 8).unwrap(), 3);
        let got = [0, 1, 2].map(|at| receiver.datagram(at));
        assert_eq!(
            got.map(|datagram| datagram.part.of(receiver.buffer())),
            [&b"hellowor"[..], b"world", b""]
        );
        assert_eq!(got.map(|datagram| datagram.truncated), [true, false, false]);
        assert!(got.iter().all(|datagram| datagram.source == Ipv4Addr::LOCALHOST));
        assert_eq!(
            receiver.receive(to.as_fd(), 8).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn a_group_arrives_as_its_datagrams_and_merged_where_that_is_asked_for() {
        let (from, plain) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let merging = UdpSocket::bind("127.0.0.1:0").unwrap();
        let asked = |udp| Descriptors { tun: None, udp };
        asked(merging.as_fd()).merge(true).unwrap();
        asked(from.as_fd()).segment().unwrap();
        let parts = [Part { start: 0, len: 2 }, Part { start: 2, len: 5 }];
        let group = [Message {
            to: Ipv4Addr::LOCALHOST,
            parts: 0..2,
            segment_size: 3,
        }];
        for to in [&plain, &merging] {
            let port = to.local_addr().unwrap().port();
            assert_eq!(
                Sender::default()
                    .send(from.as_fd(), port, b"abcdefg", &parts, &group)
                    .unwrap(),
                1
            );
        }
        let mut receiver = Receiver::new(8, 100);
        assert_eq!(receiver.receive(plain.as_fd(), 8).unwrap(), 3);
        let got = [0, 1, 2].map(|at| receiver.datagram(at).part.of(receiver.buffer()).to_vec());
        assert_eq!(got, [&b"abc"[..], b"def", b"g"]);

        assert_eq!(receiver.receive(merging.as_fd(), 8).unwrap(), 1);
        let datagram = receiver.datagram(0);
        assert_eq!(
            (datagram.segment_size, datagram.part.of(receiver.buffer())),
            (3, &b"abcdefg"[..])
        );
    }

    #[test]
    fn the_running_kernel_has_a_version() {
        assert!(kernel_version() >= (3, 0));
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
