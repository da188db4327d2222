//! TUN to UDP.

use std::io::{self, IoSlice};
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::bucket::Bucket;
use super::receive::is_dead;
use super::tun::{Outlet, Read};
use super::{Fatal, Served, Tun};
use crate::checksum;
use crate::counters::{Reason, Tally};
use crate::forward::{self, FromTun, Rules};
use crate::group::Groups;
use crate::icmp::{self, Unreachable};
use crate::packet::Ipv4Packet;
use crate::routes::Routes;
use crate::segment::{HEADER_ROOM, Segmenter};
use crate::sys::{Message, Part, Sender};
use crate::transport::Transport;
use crate::virtio::{self, Header, Task};

/// Packets or super-packets per round. A read takes one, so this bounds how long the other direction waits.
const BURST: usize = 64;
/// The longest packet a TUN can give, with its virtio header.
const LONGEST: usize = 65_536 + virtio::LEN;
/// Bytes of a round; it ends early rather than go over.
const ROUND_BYTES: usize = 512 * 1024;
/// Bytes gathered before they are sent: one super-packet goes out while it is still in the cache.
const GATHERED: usize = 32 * 1024;
const ARENA: usize = GATHERED + LONGEST;
/// Written headers of segments waiting to be sent, behind the arena in the same buffer.
const HEADERS: usize = 256;
/// How often ENOBUFS (the device's queue is full) is tried again.
const RETRIES: usize = 3;
/// How long a full socket buffer is waited for; once, until something was sent again. The worker does nothing else
/// meanwhile.
const PATIENCE: Duration = Duration::from_millis(10);
/// Groups refused before any was taken, after which they are no longer tried.
const REFUSALS: u32 = 8;

/// Where datagrams go; the real one is [`UdpSocket`], tests have one that fails on request.
pub trait Underlay {
    /// Sends the messages. Returns how many were taken, at least one; an error is about the first.
    fn send(&mut self, buffer: &[u8], parts: &[Part], messages: &[Message]) -> io::Result<usize>;

    /// Waits up to `patience` until something may be sent.
    fn wait_writable(&mut self, patience: Duration);
}

pub struct UdpSocket<'fd> {
    fd: BorrowedFd<'fd>,
    port: u16,
    sender: Sender,
}

impl<'fd> UdpSocket<'fd> {
    pub fn new(fd: BorrowedFd<'fd>, port: u16) -> Self {
        Self {
            fd,
            port,
            sender: Sender::default(),
        }
    }
}

impl Underlay for UdpSocket<'_> {
    fn send(&mut self, buffer: &[u8], parts: &[Part], messages: &[Message]) -> io::Result<usize> {
        self.sender.send(self.fd, self.port, buffer, parts, messages)
    }

    fn wait_writable(&mut self, patience: Duration) {
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        // An interrupted or failed wait only means that the next try comes sooner.
        let _ = poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&patience));
    }
}

pub struct Transmit {
    /// Packets as read, then headers as written.
    buffer: Box<[u8]>,
    /// Bytes of packets and number of headers waiting to be sent.
    used: usize,
    headers: usize,
    post: Post,
    answers: Bucket,
}

impl Transmit {
    /// `segments`: how many packets one message may hold.
    pub fn new(segments: usize) -> Self {
        Self {
            buffer: vec![0; ARENA + HEADERS * HEADER_ROOM].into(),
            used: 0,
            headers: 0,
            post: Post::new(segments),
            answers: Bucket::new(Instant::now()),
        }
    }

    /// One burst.
    pub fn round(
        &mut self,
        tun: &Tun,
        underlay: &mut impl Underlay,
        routes: &Routes,
        rules: &Rules,
        tally: &mut Tally,
    ) -> Result<Served, Fatal> {
        let (mut reads, mut bytes, mut drained) = (0, 0, false);
        while reads < BURST && bytes < ROUND_BYTES {
            if self.used > GATHERED {
                self.flush(underlay, tally)?;
            }
            let at = self.used + tun.header_len();
            let (header, length) = match tun.read(&mut self.buffer[self.used..self.used + LONGEST])? {
                Read::Packet(header, length) => (header, length),
                Read::Nothing => {
                    drained = true;
                    break;
                }
                Read::Lost => {
                    reads += 1;
                    tally.drop(Reason::TunError);
                    continue;
                }
            };
            reads += 1;
            bytes += length;
            match decide(&self.buffer[at..at + length], header, routes, rules) {
                Ok((to, task)) => self.take(
                    Part {
                        start: at,
                        len: length,
                    },
                    to,
                    task,
                    underlay,
                    tally,
                )?,
                Err(Refusal::Drop(reason)) => tally.drop(reason),
                Err(Refusal::Reply(unreachable)) => {
                    tally.drop(Reason::NoRoute);
                    if self.answers.take(Instant::now()) {
                        tally.icmp_sent += u64::from(answer(tun, &unreachable)?);
                    }
                }
            }
        }
        self.flush(underlay, tally)?;
        Ok(match reads {
            0 => Served::Nothing,
            _ if drained => Served::Drained,
            _ => Served::More,
        })
    }

    /// Does the kernel's unfinished work on the packet at `part` and lines the result up for `to`.
    fn take(
        &mut self,
        part: Part,
        to: Ipv4Addr,
        task: Task,
        underlay: &mut impl Underlay,
        tally: &mut Tally,
    ) -> Result<(), Fatal> {
        self.used = (part.start + part.len).next_multiple_of(64);
        let flow = Ipv4Packet::parse(part.of(&self.buffer))
            .ok()
            .and_then(|packet| Some(Transport::of(packet)?.flow(packet)));
        match task {
            Task::Nothing => self.post.groups.push(to, flow, part, None),
            Task::Checksum { start, field } => {
                let packet = &mut self.buffer[part.start..part.start + part.len];
                let value = virtio::completed(packet, start);
                checksum::store(packet, field, value);
                self.post.groups.push(to, flow, part, None);
            }
            Task::Segment { transport, size } => {
                let mut segmenter = Segmenter::new(part.of(&self.buffer), part.start, transport, size);
                loop {
                    if self.headers == HEADERS {
                        // The payloads of this super-packet stay where they are: only `flush` would release them.
                        self.post.send(&self.buffer, underlay, tally)?;
                        self.headers = 0;
                    }
                    let (arena, headers) = self.buffer.split_at_mut(ARENA);
                    let start = self.headers * HEADER_ROOM;
                    let Some((len, payload)) = segmenter.next(arena, &mut headers[start..]) else {
                        break;
                    };
                    self.headers += 1;
                    let header = Part {
                        start: ARENA + start,
                        len,
                    };
                    self.post.groups.push(to, flow, header, Some(payload));
                }
            }
        }
        Ok(())
    }

    /// Why packets are no longer sent in groups, once, when that has come to be.
    pub fn given_up(&mut self) -> Option<Errno> {
        self.post.given_up.take()
    }

    fn flush(&mut self, underlay: &mut impl Underlay, tally: &mut Tally) -> Result<(), Fatal> {
        self.post.send(&self.buffer, underlay, tally)?;
        (self.used, self.headers) = (0, 0);
        Ok(())
    }
}

enum Refusal<'a> {
    Drop(Reason),
    Reply(Unreachable<'a>),
}

/// Where a packet from the TUN goes, and what is to be done with it first.
fn decide<'a>(
    bytes: &'a [u8],
    header: Header,
    routes: &Routes,
    rules: &Rules,
) -> Result<(Ipv4Addr, Task), Refusal<'a>> {
    let packet = Ipv4Packet::parse(bytes).map_err(Refusal::Drop)?;
    let task = header.task(packet).ok_or(Refusal::Drop(Reason::BadLength))?;
    let unit = match task {
        Task::Segment { transport, size } => bytes.len().min(transport.end + size),
        Task::Nothing | Task::Checksum { .. } => bytes.len(),
    };
    match forward::from_tun(packet, unit, routes, rules) {
        FromTun::Forward(to) => Ok((to, task)),
        FromTun::Reply(unreachable) => Err(Refusal::Reply(unreachable)),
        FromTun::Drop(reason) => Err(Refusal::Drop(reason)),
    }
}

/// True if it was written. Whether the sender is told matters less than anything else that can go wrong here.
fn answer(tun: &Tun, unreachable: &Unreachable<'_>) -> Result<bool, Fatal> {
    let mut packet = [0; icmp::MAX_LEN];
    let length = unreachable.write(&mut packet);
    match tun.write(
        Header::default(),
        std::iter::once(IoSlice::new(&packet[..length])),
    ) {
        Err(errno) if super::is_fatal(errno) => Err(Fatal::new("the TUN failed in write", &errno)),
        written => Ok(written.is_ok()),
    }
}

/// What waits to be sent, and what was learnt about sending.
struct Post {
    groups: Groups,
    /// Did the kernel ever take a group, and how many did it refuse?
    grouped: bool,
    refusals: u32,
    /// Why groups are no longer made.
    given_up: Option<Errno>,
}

impl Post {
    fn new(segments: usize) -> Self {
        Self {
            groups: Groups::new(segments),
            grouped: false,
            refusals: 0,
            given_up: None,
        }
    }

    /// Sends everything and forgets it. Whatever goes wrong concerns one message; the others go on.
    fn send(&mut self, buffer: &[u8], underlay: &mut impl Underlay, tally: &mut Tally) -> Result<(), Fatal> {
        if self.groups.is_empty() {
            return Ok(());
        }
        self.groups.pack();
        let mut refused = Vec::new();
        let taken = self.send_messages(self.groups.messages(), buffer, underlay, tally, &mut refused)?;
        self.grouped |= taken;
        for errno in refused {
            self.refusals += 1;
            // EIO: the device computes no checksums (kernels before 6.11), or IPsec is on the route. That will not
            // change. The others may concern one peer's path, so only a kernel that never took any is given up.
            if errno == Errno::IO || (!self.grouped && self.refusals >= REFUSALS) {
                self.groups.set_limit(1);
                self.given_up = Some(errno);
            }
        }
        self.groups.clear();
        Ok(())
    }

    /// Sends `messages`, refused groups packet by packet in their place, and lists why they were refused. True if
    /// a group was taken.
    fn send_messages(
        &self,
        messages: &[Message],
        buffer: &[u8],
        underlay: &mut impl Underlay,
        tally: &mut Tally,
        refused: &mut Vec<Errno>,
    ) -> Result<bool, Fatal> {
        let mut rest = messages;
        let (mut retries, mut waited, mut grouped) = (0, false, false);
        while let [first, others @ ..] = rest {
            match underlay.send(buffer, self.groups.parts(), rest) {
                Ok(sent) => {
                    let sent = sent.clamp(1, rest.len());
                    for message in &rest[..sent] {
                        let (bytes, packets) = self.groups.size(message);
                        tally.out_packets += packets as u64;
                        tally.out_bytes += bytes as u64;
                        grouped |= packets > 1;
                        let traffic = tally.peers.of(message.to);
                        traffic.out_packets += packets as u64;
                        traffic.out_bytes += bytes as u64;
                    }
                    rest = &rest[sent..];
                    waited = false;
                }
                Err(error) => {
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                    let packets = self.groups.size(first).1;
                    match errno {
                        Errno::INTR => continue,
                        Errno::NOBUFS if retries < RETRIES => {
                            retries += 1;
                            continue;
                        }
                        Errno::AGAIN if !waited => {
                            waited = true;
                            underlay.wait_writable(PATIENCE);
                            continue;
                        }
                        Errno::IO | Errno::INVAL | Errno::MSGSIZE if packets > 1 => {
                            refused.push(errno);
                            self.send_messages(&self.groups.singly(first), buffer, underlay, tally, refused)?;
                        }
                        _ if is_dead(&error) => {
                            return Err(Fatal::new("the UDP socket failed in send", &error));
                        }
                        _ => {
                            let reason = match errno {
                                Errno::NOBUFS | Errno::AGAIN => Reason::QueueFull,
                                Errno::MSGSIZE => Reason::TooBig,
                                _ => Reason::SendError,
                            };
                            tally.drop_many(reason, packets as u64);
                            tally.peers.of(first.to).drops += packets as u64;
                        }
                    }
                    rest = others;
                }
            }
            retries = 0;
        }
        Ok(grouped)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::group::Flow;

    /// Destination and bytes of a packet.
    type Sent = (Ipv4Addr, Vec<u8>);

    /// An underlay that takes one message per call, or refuses as its script says.
    #[derive(Default)]
    struct FakeUnderlay {
        /// Answers to come; when there are no more, everything is taken.
        script: VecDeque<Result<usize, Errno>>,
        refuses_groups: Option<Errno>,
        sent: Vec<Sent>,
        groups: usize,
        waits: usize,
    }

    impl Underlay for FakeUnderlay {
        fn send(&mut self, buffer: &[u8], parts: &[Part], messages: &[Message]) -> io::Result<usize> {
            let taken = match self.script.pop_front() {
                Some(Ok(taken)) => taken,
                Some(Err(errno)) => return Err(errno.into()),
                None => messages.len(),
            };
            for (n, message) in messages[..taken].iter().enumerate() {
                let bytes: Vec<u8> = parts[message.parts.clone()]
                    .iter()
                    .flat_map(|part| part.of(buffer))
                    .copied()
                    .collect();
                if bytes.len() > usize::from(message.segment_size) {
                    if let Some(errno) = self.refuses_groups {
                        return if n > 0 { Ok(n) } else { Err(errno.into()) };
                    }
                    self.groups += 1;
                }
                for packet in bytes.chunks(message.segment_size.into()) {
                    self.sent.push((message.to, packet.to_vec()));
                }
            }
            Ok(taken)
        }

        fn wait_writable(&mut self, _: Duration) {
            self.waits += 1;
        }
    }

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    /// Three packets to A, two to B, one to A; of 10 bytes each.
    fn post(segments: usize) -> (Post, Vec<u8>, Vec<Sent>) {
        let buffer: Vec<u8> = (0..60).collect();
        let mut post = Post::new(segments);
        let plan = [A, A, A, B, B, A];
        for (n, to) in plan.into_iter().enumerate() {
            let (head, payload) = (
                Part {
                    start: n * 10,
                    len: 4,
                },
                Part {
                    start: n * 10 + 4,
                    len: 6,
                },
            );
            // The last could belong to any flow, and so stays the last.
            let flow = (n < 5).then(|| Flow::of(u64::from(to.to_bits()) << 56));
            post.groups.push(to, flow, head, Some(payload));
        }
        let wanted = plan
            .into_iter()
            .zip(buffer.chunks(10).map(<[u8]>::to_vec))
            .collect();
        (post, buffer, wanted)
    }

    #[test]
    fn everything_goes_out_in_order_however_little_the_kernel_takes_at_once() {
        for script in [
            vec![],
            vec![Ok(1), Ok(1), Ok(1)],
            vec![Ok(2), Err(Errno::INTR), Ok(1)],
        ] {
            let (mut post, buffer, wanted) = post(63);
            let mut underlay = FakeUnderlay {
                script: script.into(),
                ..Default::default()
            };
            let mut tally = Tally::default();
            post.send(&buffer, &mut underlay, &mut tally).unwrap();
            assert_eq!(underlay.sent, wanted);
            assert_eq!((underlay.groups, tally.out_packets, tally.out_bytes), (2, 6, 60));
            assert!(post.groups.is_empty());
        }
    }

    #[test]
    fn a_device_without_checksums_gets_single_packets_from_then_on() {
        let (mut post, buffer, wanted) = post(63);
        let mut underlay = FakeUnderlay {
            refuses_groups: Some(Errno::IO),
            ..Default::default()
        };
        let mut tally = Tally::default();
        post.send(&buffer, &mut underlay, &mut tally).unwrap();
        assert_eq!(underlay.sent, wanted, "in order");
        assert_eq!((tally.out_packets, tally.drops(Reason::SendError)), (6, 0));
        assert_eq!(post.given_up, Some(Errno::IO), "status says why");

        underlay = FakeUnderlay::default();
        for _ in 0..3 {
            post.groups
                .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
        }
        post.send(&buffer, &mut underlay, &mut tally).unwrap();
        assert_eq!((underlay.groups, underlay.sent.len()), (0, 3));
    }

    #[test]
    fn one_peer_with_a_small_path_mtu_costs_nobody_their_groups() {
        for errno in [Errno::MSGSIZE, Errno::INVAL] {
            let (mut post, buffer, wanted) = post(63);
            let script = [Err(errno)];
            let mut underlay = FakeUnderlay {
                script: script.into(),
                ..Default::default()
            };
            let mut tally = Tally::default();
            post.send(&buffer, &mut underlay, &mut tally).unwrap();
            assert_eq!(underlay.sent, wanted, "in order");
            assert_eq!((underlay.groups, tally.out_packets), (1, 6));
            assert_eq!(post.given_up, None);
            post.groups
                .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
            post.groups
                .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
            post.groups.pack();
            assert_eq!(post.groups.messages().len(), 1, "groups are still made");
        }
    }

    #[test]
    fn a_kernel_that_never_takes_a_group_is_not_asked_forever() {
        let (_, buffer, _) = post(63);
        let mut post = Post::new(63);
        let mut underlay = FakeUnderlay {
            refuses_groups: Some(Errno::INVAL),
            ..Default::default()
        };
        for _ in 0..REFUSALS {
            post.groups
                .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
            post.groups
                .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
            post.send(&buffer, &mut underlay, &mut Tally::default()).unwrap();
        }
        post.groups
            .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
        post.groups
            .push(A, Some(Flow::of(0)), Part { start: 0, len: 10 }, None);
        post.groups.pack();
        assert_eq!(post.groups.messages().len(), 2);
        assert_eq!(underlay.sent.len(), 2 * REFUSALS as usize);
    }

    #[test]
    fn an_error_costs_one_message_and_is_counted_by_its_reason() {
        for (errno, times, reason) in [
            (Errno::NETUNREACH, 1, Reason::SendError),
            (Errno::HOSTUNREACH, 1, Reason::SendError),
            (Errno::PERM, 1, Reason::SendError),
            (Errno::NOBUFS, 1 + RETRIES, Reason::QueueFull),
            (Errno::AGAIN, 2, Reason::QueueFull),
        ] {
            let (mut post, buffer, wanted) = post(63);
            let script = std::iter::repeat_n(Err(errno), times).collect();
            let mut underlay = FakeUnderlay {
                script,
                ..Default::default()
            };
            let mut tally = Tally::default();
            post.send(&buffer, &mut underlay, &mut tally).unwrap();
            assert_eq!(tally.drops(reason), 3, "{errno}: the group to A");
            assert_eq!(underlay.sent, wanted[3..]);
            assert_eq!(underlay.waits, usize::from(errno == Errno::AGAIN));
        }
        let (mut post, buffer, wanted) = post(1);
        let mut underlay = FakeUnderlay {
            script: [Err(Errno::MSGSIZE)].into(),
            ..Default::default()
        };
        let mut tally = Tally::default();
        post.send(&buffer, &mut underlay, &mut tally).unwrap();
        assert_eq!(
            (tally.drops(Reason::TooBig), &underlay.sent[..]),
            (1, &wanted[1..])
        );
    }

    #[test]
    fn a_queue_that_empties_in_time_costs_nothing() {
        let (mut post, buffer, wanted) = post(63);
        let script = [Err(Errno::NOBUFS), Err(Errno::NOBUFS), Ok(1), Err(Errno::AGAIN)];
        let mut underlay = FakeUnderlay {
            script: script.into(),
            ..Default::default()
        };
        post.send(&buffer, &mut underlay, &mut Tally::default()).unwrap();
        assert_eq!(underlay.sent, wanted);
    }

    #[test]
    fn a_socket_that_stays_full_is_waited_for_once() {
        let (mut post, buffer, wanted) = post(1);
        let mut script: VecDeque<_> = std::iter::repeat_n(Err(Errno::AGAIN), 6).collect();
        script.push_back(Ok(1));
        let mut underlay = FakeUnderlay {
            script,
            ..Default::default()
        };
        let mut tally = Tally::default();
        post.send(&buffer, &mut underlay, &mut tally).unwrap();
        assert_eq!((underlay.waits, tally.drops(Reason::QueueFull)), (1, 5));
        assert_eq!(underlay.sent, wanted[5..]);
    }

    #[test]
    fn a_socket_that_is_gone_ends_it() {
        let (mut post, buffer, _) = post(63);
        let mut underlay = FakeUnderlay {
            script: [Err(Errno::BADF)].into(),
            ..Default::default()
        };
        assert!(post.send(&buffer, &mut underlay, &mut Tally::default()).is_err());
    }
}
