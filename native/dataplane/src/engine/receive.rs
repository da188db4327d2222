//! UDP to TUN.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::tun::Outlet;
use super::{Fatal, Served, is_fatal};
use crate::coalesce::{Coalescer, Kinds, Output};
use crate::counters::{Reason, Tally};
use crate::forward::{self, Rules};
use crate::packet::Ipv4Packet;
use crate::routes::Routes;
use crate::segment::{HEADER_ROOM, Segmenter};
use crate::sys::Receiver;
use crate::virtio::{self, Header, Task};

/// Datagrams per round, and per system call.
const BURST: usize = 64;
/// The same while the kernel hands over merged ones of up to 64 KiB: as many bytes, about.
const MERGED_BURST: usize = 8;
/// Mean length from which they count as merged.
const MERGED: usize = 8 * 1024;
/// Room for the longest datagram. Not a power of two: else all slots would share a few cache sets.
const SLOT: usize = 65_536 + 33 * 64;

/// Refused super-packets in a row after which none are written any more. Kernels with half of a virtio fix (6.6.44
/// and others) refuse what they should take, with no sign of it when the TUN is opened.
const REFUSALS: u32 = 3;

pub struct Receive {
    receiver: Receiver,
    burst: usize,
    coalescer: Coalescer,
    writer: Writer,
    /// Did the TUN refuse super-packets until we stopped?
    given_up: bool,
    stopped: bool,
}

impl Receive {
    /// `kinds`: the super-packets the TUN takes.
    pub fn new(kinds: Kinds) -> Self {
        Self {
            receiver: Receiver::new(BURST, SLOT),
            burst: BURST,
            coalescer: Coalescer::new(kinds),
            writer: Writer::default(),
            given_up: false,
            stopped: false,
        }
    }

    /// True once, when super-packets have come to be no longer written.
    pub fn given_up(&mut self) -> bool {
        std::mem::take(&mut self.given_up)
    }

    /// One burst.
    pub fn round(
        &mut self,
        udp: &OwnedFd,
        tun: &impl Outlet,
        routes: &Routes,
        rules: &Rules,
        tally: &mut Tally,
    ) -> Result<Served, Fatal> {
        let asked = self.burst;
        let count = match self.receiver.receive(udp.as_fd(), asked) {
            Ok(count) => count,
            Err(error) if is_dead(&error) => {
                return Err(Fatal::new("the UDP socket failed in receive", &error));
            }
            // Nothing there, or news about an earlier datagram (ECONNREFUSED and the like), which concern no packet.
            Err(_) => return Ok(Served::Nothing),
        };
        let buffer = self.receiver.buffer();
        let mut bytes = 0;
        for at in 0..count {
            let datagram = self.receiver.datagram(at);
            bytes += datagram.part.len;
            if datagram.truncated {
                tally.drop(Reason::TooBig);
                continue;
            }
            let (mut packets, mut taken, mut refused) = (0, 0, 0);
            for part in datagram.part.pieces(datagram.segment_size) {
                match forward::from_peer(part.of(buffer), datagram.source, routes, rules) {
                    Ok(delivery) => {
                        packets += 1;
                        taken += part.len as u64;
                        match delivery.header() {
                            None => self.coalescer.push(buffer, part),
                            Some(header) => self.coalescer.push_alone(buffer, part, header),
                        }
                    }
                    Err(reason) => {
                        refused += 1;
                        tally.drop(reason);
                    }
                }
            }
            if routes.is_peer(datagram.source) {
                let traffic = tally.peers.of(datagram.source);
                traffic.in_packets += packets;
                traffic.in_bytes += taken;
                traffic.drops += refused;
            }
        }
        self.coalescer
            .drain(buffer, |output| self.writer.write(tun, output, tally))?;
        if self.writer.refusals >= REFUSALS && !self.stopped {
            (self.stopped, self.given_up) = (true, true);
            self.coalescer.set_kinds(Kinds::NONE);
        }
        self.burst = if bytes / count > MERGED {
            MERGED_BURST
        } else {
            BURST
        };
        Ok(if count == asked {
            Served::More
        } else {
            Served::Drained
        })
    }
}

#[derive(Default)]
struct Writer {
    /// Super-packets refused since one was taken.
    refusals: u32,
}

impl Writer {
    fn write(&mut self, tun: &impl Outlet, output: &Output<'_>, tally: &mut Tally) -> Result<(), Fatal> {
        if output.packets() == 1 {
            return deliver(tun, output.header, output.first(), tally);
        }
        match tun.write(output.header, output.pieces()) {
            Ok(()) => {
                self.refusals = 0;
                tally.in_packets += output.packets() as u64;
                tally.in_bytes += output.singly().map(|packet| packet.len() as u64).sum::<u64>();
                Ok(())
            }
            Err(Errno::INVAL) => {
                self.refusals += 1;
                output
                    .singly()
                    .try_for_each(|packet| deliver(tun, Header::default(), packet, tally))
            }
            Err(errno) => refused(errno, output.packets(), tally),
        }
    }
}

/// Writes one packet. What its sender left to a network card is left to the kernel, or done here where the TUN
/// cannot be told of it, or refuses it.
fn deliver(tun: &impl Outlet, header: Header, packet: &[u8], tally: &mut Tally) -> Result<(), Fatal> {
    let left = header != Header::default();
    let written = if left && !tun.has_headers() {
        finish(tun, header, packet)
    } else {
        match tun.write(header, std::iter::once(IoSlice::new(packet))) {
            Err(Errno::INVAL) if left => finish(tun, header, packet),
            written => written,
        }
    };
    match written {
        Ok(()) => {
            tally.in_packets += 1;
            tally.in_bytes += packet.len() as u64;
            Ok(())
        }
        Err(errno) => refused(errno, 1, tally),
    }
}

/// Writes `packet` with its checksum completed, or cut.
fn finish(tun: &impl Outlet, header: Header, packet: &[u8]) -> Result<(), Errno> {
    let parsed = Ipv4Packet::parse(packet).map_err(|_| Errno::INVAL)?;
    match header.task(parsed).ok_or(Errno::INVAL)? {
        Task::Nothing => tun.write(Header::default(), std::iter::once(IoSlice::new(packet))),
        Task::Checksum { start, field } => {
            let value = virtio::completed(packet, start).to_ne_bytes();
            let pieces = [&packet[..field], &value, &packet[field + 2..]];
            tun.write(Header::default(), pieces.into_iter().map(IoSlice::new))
        }
        Task::Segment { transport, size } => {
            let mut segmenter = Segmenter::new(packet, 0, transport, size);
            let mut room = [0; HEADER_ROOM];
            while let Some((length, payload)) = segmenter.next(packet, &mut room) {
                let pieces = [&room[..length], payload.of(packet)];
                tun.write(Header::default(), pieces.into_iter().map(IoSlice::new))?;
            }
            Ok(())
        }
    }
}

/// Counts a failed write, or says that there will be no more.
fn refused(errno: Errno, packets: usize, tally: &mut Tally) -> Result<(), Fatal> {
    match errno {
        Errno::AGAIN | Errno::NOBUFS => tally.drop_many(Reason::QueueFull, packets as u64),
        errno if is_fatal(errno) => return Err(Fatal::new("the TUN failed in write", &errno)),
        _ => tally.drop_many(Reason::TunError, packets as u64),
    }
    Ok(())
}

/// Is the socket itself gone?
pub(super) fn is_dead(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(is_fatal)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::net::UdpSocket;

    use super::*;
    use crate::forward::PeerCheck;
    use crate::packet::{TCP, UDP};
    use crate::routes::Route;
    use crate::segment::tests::segment;
    use crate::sys::Part;
    use crate::transport::Transport;
    use crate::transport::tests::{unfinished, valid};

    /// A TUN that refuses as it is told.
    struct FakeTun {
        headers: bool,
        refuses: fn(Header) -> Option<Errno>,
        written: RefCell<Vec<(Header, Vec<u8>)>>,
    }

    impl FakeTun {
        fn new(headers: bool, refuses: fn(Header) -> Option<Errno>) -> Self {
            Self {
                headers,
                refuses,
                written: RefCell::default(),
            }
        }
    }

    impl Outlet for FakeTun {
        fn has_headers(&self) -> bool {
            self.headers
        }

        fn write<'a>(&self, header: Header, pieces: impl Iterator<Item = IoSlice<'a>>) -> Result<(), Errno> {
            if let Some(errno) = (self.refuses)(header) {
                return Err(errno);
            }
            self.written
                .borrow_mut()
                .push((header, pieces.flat_map(|piece| piece.to_vec()).collect()));
            Ok(())
        }
    }

    const ALL: Kinds = Kinds { tcp: true, udp: true };

    /// Writes ten UDP packets of one flow as one burst.
    fn burst(tun: &FakeTun, writer: &mut Writer) -> (Vec<u8>, Result<Tally, Fatal>) {
        let packet = valid(UDP, &[7; 100]);
        let buffer = packet.repeat(10);
        let mut coalescer = Coalescer::new(ALL);
        let whole = Part {
            start: 0,
            len: buffer.len(),
        };
        whole
            .pieces(packet.len())
            .for_each(|part| coalescer.push(&buffer, part));
        let mut tally = Tally::default();
        let drained = coalescer.drain(&buffer, |output| writer.write(tun, output, &mut tally));
        (packet, drained.map(|()| tally))
    }

    #[test]
    fn a_burst_of_one_flow_is_one_write() {
        let tun = FakeTun::new(true, |_| None);
        let (packet, tally) = burst(&tun, &mut Writer::default());
        let tally = tally.unwrap();
        assert_eq!((tally.in_packets, tally.in_bytes), (10, 10 * packet.len() as u64));
        assert_eq!(tun.written.borrow().len(), 1);
    }

    #[test]
    fn a_kernel_that_refuses_super_packets_gets_the_packets_as_they_came() {
        let tun = FakeTun::new(true, |header| {
            (header != Header::default()).then_some(Errno::INVAL)
        });
        let mut writer = Writer::default();
        let (packet, tally) = burst(&tun, &mut writer);
        assert_eq!(tally.unwrap().in_packets, 10);
        assert!(
            tun.written
                .borrow()
                .iter()
                .all(|(header, bytes)| *header == Header::default() && *bytes == packet)
        );
        assert_eq!((tun.written.borrow().len(), writer.refusals), (10, 1));
    }

    #[test]
    fn after_three_refusals_none_are_written_any_more_and_that_is_said_once() {
        let (udp, peer) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let to = udp.local_addr().unwrap();
        udp.set_nonblocking(true).unwrap();
        let udp = OwnedFd::from(udp);
        let route = Route::new([172, 17, 7, 0].into(), 24, [127, 0, 0, 1].into()).unwrap();
        let routes = Routes::new([route]).unwrap();
        let rules = Rules {
            own: "172.17.41.1/24".parse().unwrap(),
            mtu: 1472,
            peer_check: PeerCheck::Strict,
        };
        let tun = FakeTun::new(true, |header| {
            (header != Header::default()).then_some(Errno::INVAL)
        });
        let mut receive = Receive::new(ALL);
        let mut tally = Tally::default();
        let said: Vec<bool> = (0..5)
            .map(|_| {
                for _ in 0..10 {
                    peer.send_to(&valid(UDP, &[7; 100]), to).unwrap();
                }
                assert_eq!(
                    receive.round(&udp, &tun, &routes, &rules, &mut tally).unwrap(),
                    Served::Drained
                );
                receive.given_up()
            })
            .collect();
        assert_eq!(said, [false, false, true, false, false]);
        assert_eq!(
            (tally.in_packets, tun.written.borrow().len()),
            (50, 50),
            "none was lost"
        );
        assert_eq!(tally.peers.of([127, 0, 0, 1].into()).in_packets, 50);
        let nothing = receive.round(&udp, &tun, &routes, &rules, &mut tally).unwrap();
        assert_eq!(nothing, Served::Nothing);
    }

    #[test]
    fn a_full_queue_and_a_device_that_is_down_cost_the_packets_and_a_deleted_one_ends_it() {
        for (errno, reason) in [(Errno::AGAIN, Reason::QueueFull), (Errno::IO, Reason::TunError)] {
            let tun = match errno {
                Errno::AGAIN => FakeTun::new(true, |_| Some(Errno::AGAIN)),
                _ => FakeTun::new(true, |_| Some(Errno::IO)),
            };
            let tally = burst(&tun, &mut Writer::default()).1.unwrap();
            assert_eq!((tally.in_packets, tally.drops(reason)), (0, 10));
        }
        let gone = FakeTun::new(true, |_| Some(Errno::BADFD));
        assert!(burst(&gone, &mut Writer::default()).1.is_err());
    }

    #[test]
    fn an_unfinished_checksum_is_finished_for_a_tun_that_cannot_be_told() {
        let whole = valid(TCP, b"some bytes");
        let partial = unfinished(whole.clone());
        let transport = Transport::of(Ipv4Packet::parse(&partial).unwrap()).unwrap();
        let header = Header::needs_checksum(transport);
        for (headers, wanted) in [
            (false, (Header::default(), whole)),
            (true, (header, partial.clone())),
        ] {
            let tun = FakeTun::new(headers, |_| None);
            deliver(&tun, header, &partial, &mut Tally::default()).unwrap();
            assert_eq!(*tun.written.borrow(), [wanted]);
        }
    }
    #[test]
    fn a_super_packet_is_cut_for_a_tun_that_cannot_be_told_or_refuses_it() {
        let whole = valid(TCP, &[7; 1000]);
        let partial = unfinished(whole.clone());
        let transport = Transport::of(Ipv4Packet::parse(&partial).unwrap()).unwrap();
        let header = Header::super_packet(transport, 300);
        let refuses: fn(Header) -> Option<Errno> =
            |header| (header != Header::default()).then_some(Errno::INVAL);
        let cut = segment(&whole, 300);
        assert_eq!(cut.len(), 4);
        for tun in [FakeTun::new(false, |_| None), FakeTun::new(true, refuses)] {
            let mut tally = Tally::default();
            deliver(&tun, header, &partial, &mut tally).unwrap();
            let written: Vec<_> = tun.written.take().into_iter().map(|(_, bytes)| bytes).collect();
            assert_eq!(written, cut);
            assert_eq!((tally.in_packets, tally.in_bytes), (1, partial.len() as u64));
        }
    }
}
