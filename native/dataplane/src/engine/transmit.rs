//! TUN to UDP.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::bucket::Bucket;
use super::receive::is_dead;
use super::tun::Read;
use super::{Fatal, Tun};
use crate::counters::{Reason, Tally};
use crate::forward::{self, FromTun, Rules};
use crate::icmp;
use crate::packet::Ipv4Packet;
use crate::routes::Routes;
use crate::sys::{Message, Part, Sender};

/// Packets per round. A read takes one packet, so this bounds how long the other direction waits.
const BURST: usize = 64;
/// The longest packet a TUN can give.
const LONGEST: usize = 65_536;
/// Room for a burst; a round ends early rather than split a packet.
const ARENA: usize = 512 * 1024;
/// How often ENOBUFS (the device's queue is full) is tried again.
const RETRIES: usize = 3;
/// How long a full socket buffer is waited for, once per message. The worker does nothing else meanwhile.
const PATIENCE: Duration = Duration::from_millis(10);

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
    arena: Box<[u8]>,
    parts: Vec<Part>,
    messages: Vec<Message>,
    answers: Bucket,
}

impl Transmit {
    #[expect(clippy::new_without_default, reason = "it reads the clock")]
    pub fn new() -> Self {
        Self {
            arena: vec![0; ARENA].into(),
            parts: Vec::with_capacity(BURST),
            messages: Vec::with_capacity(BURST),
            answers: Bucket::new(Instant::now()),
        }
    }

    /// One burst. True if there was anything.
    pub fn round(
        &mut self,
        tun: &Tun,
        underlay: &mut impl Underlay,
        routes: &Routes,
        rules: &Rules,
        tally: &mut Tally,
    ) -> Result<bool, Fatal> {
        let mut used = 0;
        let mut reads = 0;
        while reads < BURST && used + LONGEST <= ARENA {
            let slot = &mut self.arena[used..used + LONGEST];
            let length = match tun.read(slot)? {
                Read::Packet(length) => length,
                Read::Nothing => break,
                Read::Lost => {
                    reads += 1;
                    tally.drop(Reason::TunError);
                    continue;
                }
            };
            reads += 1;
            let packet = match Ipv4Packet::parse(&slot[..length]) {
                Ok(packet) => packet,
                Err(reason) => {
                    tally.drop(reason);
                    continue;
                }
            };
            match forward::from_tun(packet, length, routes, rules) {
                FromTun::Forward(to) => {
                    self.messages.push(Message {
                        to,
                        parts: self.parts.len()..self.parts.len() + 1,
                    });
                    self.parts.push(Part {
                        start: used,
                        len: length,
                    });
                    used += length.next_multiple_of(64);
                }
                FromTun::Reply(unreachable) => {
                    tally.drop(Reason::NoRoute);
                    if self.answers.take(Instant::now()) {
                        let mut answer = [0; icmp::MAX_LEN];
                        let length = unreachable.write(&mut answer);
                        tally.icmp_sent += u64::from(tun.write(&answer[..length], tally)?);
                    }
                }
                FromTun::Drop(reason) => tally.drop(reason),
            }
        }
        self.flush(underlay, tally)?;
        Ok(reads > 0)
    }

    /// Sends what was gathered. An error concerns one message; the others go on.
    fn flush(&mut self, underlay: &mut impl Underlay, tally: &mut Tally) -> Result<(), Fatal> {
        let mut rest = &self.messages[..];
        let (mut retries, mut waited) = (0, false);
        while let [_, others @ ..] = rest {
            match underlay.send(&self.arena, &self.parts, rest) {
                Ok(sent) => {
                    let sent = sent.clamp(1, rest.len());
                    for message in &rest[..sent] {
                        tally.out_packets += 1;
                        tally.out_bytes += self.parts[message.parts.clone()]
                            .iter()
                            .map(|p| p.len as u64)
                            .sum::<u64>();
                    }
                    rest = &rest[sent..];
                }
                Err(error) => {
                    let reason = match Errno::from_io_error(&error) {
                        Some(Errno::INTR) => continue,
                        Some(Errno::NOBUFS) if retries < RETRIES => {
                            retries += 1;
                            continue;
                        }
                        Some(Errno::AGAIN) if !waited => {
                            waited = true;
                            underlay.wait_writable(PATIENCE);
                            continue;
                        }
                        Some(Errno::NOBUFS | Errno::AGAIN) => Reason::QueueFull,
                        Some(Errno::MSGSIZE) => Reason::TooBig,
                        _ if is_dead(&error) => {
                            return Err(Fatal::new("the UDP socket failed in send", &error));
                        }
                        _ => Reason::SendError,
                    };
                    tally.drop(reason);
                    rest = others;
                }
            }
            (retries, waited) = (0, false);
        }
        self.messages.clear();
        self.parts.clear();
        Ok(())
    }
}
