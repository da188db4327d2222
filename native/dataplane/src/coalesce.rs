//! Merging received packets into super-packets for the TUN: one `writev` where there were up to 64.
//!
//! The rules follow the kernel's own GRO (its selftest `net/lib/gro.c`) as wireguard-go and nebula read it:
//! whatever the kernel makes of the super-packet again must be the packets we were given, byte for byte. So a
//! segment joins the open run of its flow only if all that the kernel copies into every segment is equal, and only
//! if its checksums are right, because afterwards the kernel trusts them. Packets of one flow never pass each other:
//! a packet of the flow that cannot join closes the run.

use std::io::IoSlice;

use crate::checksum;
use crate::group::Flow;
use crate::packet::{IPV4_HEADER, Ipv4Packet, TCP, UDP};
use crate::sys::Part;
use crate::transport::Transport;
use crate::virtio::Header;

/// Segments of one run. 64 is what the kernel's GRO makes by default.
pub const MAX_SEGMENTS: usize = 64;
const MAX_BYTES: usize = 65_535;
/// The longest header of a run: IPv4 without options and TCP with all of them.
const HEADER_ROOM: usize = 80;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
const CWR: u8 = 0x80;

/// Tunnels inside the overlay: their receivers lose all but the first packet of a merged datagram
/// (tailscale issue 11026). VXLAN, VXLAN before its port was assigned, Geneve.
const TUNNEL_PORTS: [u16; 3] = [4789, 8472, 6081];

/// Which packets may be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds {
    pub tcp: bool,
    pub udp: bool,
}

impl Kinds {
    pub const NONE: Self = Self {
        tcp: false,
        udp: false,
    };
}

/// A packet, or several that become one. Parts are of the buffer the packets lie in.
#[derive(Debug)]
struct Item {
    /// What `writev` needs to know about a lone packet.
    header: Header,
    /// The first packet, whole.
    first: Part,
    /// The others of the run, whole.
    more: Vec<Part>,
    /// Of the first packet; meaningful for runs only.
    transport: Transport,
    /// Payload bytes of the whole run.
    payload: usize,
    next_sequence: u32,
}

/// What is to be written to the TUN in one go.
#[derive(Debug)]
pub struct Output<'a> {
    pub header: Header,
    /// Rewritten headers of a run; empty for a lone packet.
    head: &'a [u8],
    buffer: &'a [u8],
    first: Part,
    more: &'a [Part],
    /// Where payloads begin in the packets of a run.
    end: usize,
}

impl<'a> Output<'a> {
    /// How many packets it is.
    pub fn packets(&self) -> usize {
        1 + self.more.len()
    }

    /// The first as it was received; the only one, if [`Self::packets`] is 1.
    pub fn first(&self) -> &'a [u8] {
        self.first.of(self.buffer)
    }

    /// Each of them as it was received.
    pub fn singly(&self) -> impl Iterator<Item = &'a [u8]> {
        let buffer = self.buffer;
        std::iter::once(&self.first)
            .chain(self.more)
            .map(|part| part.of(buffer))
    }

    /// The pieces of the one large packet, in order. At most [`MAX_SEGMENTS`] + 1.
    pub fn pieces(&self) -> impl Iterator<Item = IoSlice<'_>> {
        let end = if self.more.is_empty() { 0 } else { self.end };
        let head = (end > 0).then_some(self.head);
        head.into_iter()
            .chain(self.singly().map(move |packet| &packet[end..]))
            .map(IoSlice::new)
    }
}

/// Flows with an open run. Two that share a number only end each other's runs early.
const SLOTS: usize = Flow::COUNT;

/// Packets of one burst, on their way to the TUN.
#[derive(Debug)]
pub struct Coalescer {
    kinds: Kinds,
    items: Vec<Item>,
    /// Index of the item with the flow's open run, plus one.
    open: [u16; SLOTS],
    spare: Vec<Vec<Part>>,
}

impl Coalescer {
    pub fn new(kinds: Kinds) -> Self {
        Self {
            kinds,
            items: Vec::new(),
            open: [0; SLOTS],
            spare: Vec::new(),
        }
    }

    pub fn set_kinds(&mut self, kinds: Kinds) {
        self.kinds = kinds;
    }

    /// Adds a packet as it is, with `header` in front. Later packets of its flow do not join earlier ones.
    pub fn push_alone(&mut self, buffer: &[u8], part: Part, header: Header) {
        match Ipv4Packet::parse(part.of(buffer))
            .ok()
            .and_then(|packet| Some((packet, Transport::of(packet)?)))
        {
            Some((packet, transport)) => self.open[transport.flow(packet).index()] = 0,
            None => self.open = [0; SLOTS],
        }
        self.add(part, header, NO_TRANSPORT, 0, 0);
    }

    /// Adds the packet at `part` of `buffer`, to a run if it fits. All parts until [`Self::drain`] are of one buffer.
    pub fn push(&mut self, buffer: &[u8], part: Part) {
        let Ok(packet) = Ipv4Packet::parse(part.of(buffer)) else {
            return self.push_alone(buffer, part, Header::default());
        };
        let Some(transport) = self.mergeable(packet) else {
            return self.push_alone(buffer, part, Header::default());
        };
        let bytes = packet.bytes();
        let slot = transport.flow(packet).index();
        let len = bytes.len() - transport.end;
        let at = usize::from(self.open[slot]);
        if at > 0 && joins(&self.items[at - 1], buffer, bytes) {
            let item = &mut self.items[at - 1];
            if item.more.capacity() == 0 {
                item.more = self.spare.pop().unwrap_or_default();
            }
            item.more.push(part);
            item.payload += len;
            item.next_sequence = item.next_sequence.wrapping_add(len as u32);
            if len < item.size() || ends_run(bytes, transport) {
                self.open[slot] = 0;
            }
            return;
        }
        let next = if transport.protocol == TCP {
            sequence(bytes).wrapping_add(len as u32)
        } else {
            0
        };
        self.add(part, Header::default(), transport, len, next);
        // Beyond 65,535 packets in a burst (never, by the engine's buffers) runs simply stay short.
        let index = u16::try_from(self.items.len()).unwrap_or(0);
        self.open[slot] = if ends_run(bytes, transport) { 0 } else { index };
    }

    fn add(&mut self, first: Part, header: Header, transport: Transport, payload: usize, next_sequence: u32) {
        self.items.push(Item {
            header,
            first,
            more: Vec::new(),
            transport,
            payload,
            next_sequence,
        });
    }

    /// May this packet be part of a run at all? The expensive test, over all bytes, comes last.
    fn mergeable(&self, packet: Ipv4Packet<'_>) -> Option<Transport> {
        let bytes = packet.bytes();
        if packet.header_len() != IPV4_HEADER {
            return None;
        }
        let transport = Transport::of(packet)?;
        let rest = &bytes[IPV4_HEADER..];
        let may = match transport.protocol {
            TCP => self.kinds.tcp && rest[13] & (FIN | SYN | RST | URG | CWR | ACK) == ACK,
            UDP => {
                let to = u16::from_be_bytes([rest[2], rest[3]]);
                let len = usize::from(u16::from_be_bytes([rest[4], rest[5]]));
                self.kinds.udp && len == rest.len() && !TUNNEL_PORTS.contains(&to)
            }
            _ => false,
        };
        let whole = may
            && transport.end < bytes.len()
            && checksum::fold(checksum::sum(&bytes[..IPV4_HEADER])) == 0xffff
            && transport.checksum_holds(packet);
        whole.then_some(transport)
    }

    /// Hands out everything in order, and is empty afterwards. Stops at the first error.
    pub fn drain<E>(
        &mut self,
        buffer: &[u8],
        mut write: impl FnMut(&Output<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut result = Ok(());
        self.open = [0; SLOTS];
        for mut item in self.items.drain(..) {
            if result.is_ok() {
                let mut head = [0; HEADER_ROOM];
                let (mut header, end) = (item.header, item.transport.end);
                if !item.more.is_empty() {
                    header = Header::super_packet(item.transport, item.size() as u16); // a payload's length
                    item.write_head(buffer, &mut head[..end]);
                }
                let more = &item.more[..];
                result = write(&Output {
                    header,
                    head: &head[..end],
                    buffer,
                    first: item.first,
                    more,
                    end,
                });
            }
            if item.more.capacity() > 0 {
                item.more.clear();
                self.spare.push(item.more);
            }
        }
        result
    }
}

const NO_TRANSPORT: Transport = Transport {
    protocol: 0,
    start: 0,
    end: 0,
};

impl Item {
    /// Payload of the first segment: the most any other may have.
    fn size(&self) -> usize {
        self.first.len - self.transport.end
    }

    /// The first packet's headers, made to speak for the whole run.
    fn write_head(&self, buffer: &[u8], head: &mut [u8]) {
        head.copy_from_slice(&self.first.of(buffer)[..self.transport.end]);
        let (ip, rest) = head.split_at_mut(IPV4_HEADER);
        let total = (self.transport.end + self.payload) as u16; // `joins` saw to that
        let length = total - IPV4_HEADER as u16;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[10..12].fill(0);
        checksum::store(ip, 10, !checksum::fold(checksum::sum(ip)));
        if self.transport.protocol == TCP {
            // The kernel puts PSH on the last segment only, and there it must be.
            let last = self.more.last().unwrap_or(&self.first).of(buffer);
            rest[13] |= last[IPV4_HEADER + 13] & PSH;
        } else {
            rest[4..6].copy_from_slice(&length.to_be_bytes());
        }
        // Not inverted: the kernel goes on from here.
        let sum = checksum::pseudo_header(&ip[12..20], self.transport.protocol, length);
        checksum::store(rest, self.transport.checksum_offset(), checksum::fold(sum));
    }
}

/// Is `packet` (mergeable) the next segment of this run? Compares all that the kernel copies into each segment.
fn joins(run: &Item, buffer: &[u8], packet: &[u8]) -> bool {
    let end = run.transport.end;
    let first = run.first.of(buffer);
    let len = packet.len() - end.min(packet.len());
    let segments = 1 + run.more.len();
    // Version and header length, TOS; flags (DF) with no fragment offset; TTL and protocol; addresses and ports.
    let same = first[..2] == packet[..2]
        && first[6..10] == packet[6..10]
        && first[12..24] == packet[12..24]
        && len > 0
        && len <= run.size()
        && segments < MAX_SEGMENTS
        && end + run.payload + len <= MAX_BYTES;
    if !same {
        return false;
    }
    // Without DF the id tells fragments apart, and the kernel counts it up from the first (RFC 6864).
    let id = |bytes: &[u8]| u16::from_be_bytes([bytes[4], bytes[5]]);
    let dont_fragment = packet[6] & 0x40 != 0;
    if !dont_fragment && id(packet) != id(first).wrapping_add(segments as u16) {
        return false;
    }
    if run.transport.protocol == UDP {
        return true;
    }
    let flags = |bytes: &[u8]| bytes[33] & !PSH;
    sequence(packet) == run.next_sequence
        && packet[28..33] == first[28..33] // acknowledgement, header length and reserved bits
        && flags(packet) == flags(first)
        && packet[34..36] == first[34..36] // window
        && packet[38..end] == first[38..end] // urgent pointer, options
}

fn ends_run(packet: &[u8], transport: Transport) -> bool {
    transport.protocol == TCP && packet[33] & PSH != 0
}

fn sequence(packet: &[u8]) -> u32 {
    u32::from_be_bytes([packet[24], packet[25], packet[26], packet[27]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::segment::tests::segment;
    use crate::transport::tests::{unfinished, valid};
    use crate::virtio::Task;

    const ALL: Kinds = Kinds { tcp: true, udp: true };

    struct Written {
        header: Header,
        bytes: Vec<u8>,
        packets: usize,
    }

    fn coalesce(kinds: Kinds, packets: &[Vec<u8>]) -> Vec<Written> {
        let mut buffer = vec![0xee; 7];
        let mut coalescer = Coalescer::new(kinds);
        let parts: Vec<Part> = packets
            .iter()
            .map(|packet| {
                let part = Part {
                    start: buffer.len(),
                    len: packet.len(),
                };
                buffer.extend_from_slice(packet);
                part
            })
            .collect();
        for part in parts {
            coalescer.push(&buffer, part);
        }
        let mut written = Vec::new();
        let drained = coalescer.drain(&buffer, |output| {
            let bytes = output.pieces().flat_map(|piece| piece.to_vec()).collect();
            assert!(output.pieces().count() <= MAX_SEGMENTS + 1);
            written.push(Written {
                header: output.header,
                bytes,
                packets: output.packets(),
            });
            Ok::<(), ()>(())
        });
        drained.unwrap();
        assert!(coalescer.items.is_empty());
        written
    }

    /// What the kernel makes of it again.
    fn cut(written: &Written) -> Vec<Vec<u8>> {
        let packet = Ipv4Packet::parse(&written.bytes).unwrap();
        match written.header.task(packet).expect("the header fits") {
            Task::Segment { size, .. } => segment(&written.bytes, size),
            Task::Nothing => vec![written.bytes.clone()],
            Task::Checksum { .. } => panic!("nobody asked for this"),
        }
    }

    /// One packet of one of a few flows.
    #[derive(Debug, Clone)]
    struct Made {
        flow: u8,
        tcp: bool,
        len: usize,
        flags: u8,
        oddity: u8,
    }

    fn made() -> impl Strategy<Value = Made> {
        let len = prop_oneof![6 => Just(100_usize), 1 => 0_usize..100, 1 => 100_usize..200];
        let flags = prop_oneof![8 => Just(ACK), 1 => Just(ACK | PSH), 1 => any::<u8>()];
        let oddity = prop_oneof![12 => Just(0_u8), 1 => any::<u8>()];
        (0_u8..3, prop::bool::weighted(0.7), len, flags, oddity).prop_map(
            |(flow, tcp, len, flags, oddity)| Made {
                flow,
                tcp,
                len,
                flags,
                oddity,
            },
        )
    }

    /// Packets as flows would send them, with things going wrong here and there.
    fn stream(plan: &[Made]) -> Vec<Vec<u8>> {
        let mut sequences = [u32::MAX - 500, 5, 1000];
        let mut ids = [u16::MAX - 3, 100, 200];
        plan.iter()
            .enumerate()
            .map(|(n, one)| {
                let flow = usize::from(one.flow);
                let payload: Vec<u8> = (0..one.len).map(|byte| (byte * 7 + n) as u8).collect();
                let ip = etherparse::PacketBuilder::ipv4([172, 17, 7, one.flow], [172, 17, 41, 5], 63);
                let mut bytes = Vec::new();
                if one.tcp {
                    let window = if one.oddity == 1 { 7 } else { 500 };
                    ip.tcp(40, 80, sequences[flow], window)
                        .ack(9)
                        .write(&mut bytes, &payload)
                        .unwrap();
                    bytes[33] = one.flags;
                    sequences[flow] = sequences[flow].wrapping_add(one.len as u32);
                } else {
                    let port = if one.oddity == 2 { 4789 } else { 53 };
                    ip.udp(40, port).write(&mut bytes, &payload).unwrap();
                }
                bytes[4..6].copy_from_slice(&ids[flow].to_be_bytes());
                ids[flow] = ids[flow].wrapping_add(1);
                match one.oddity {
                    3 => bytes[6] = 0,    // DF clear
                    4 => bytes[6] = 0x20, // a fragment
                    5 => bytes[8] = 9,    // TTL
                    6 => bytes[1] = 3,    // ECN
                    7 => bytes[4] ^= 1,   // id
                    8 => bytes[9] = 1,    // ICMP, of a kind
                    _ => {}
                }
                // Make both checksums right again after all that.
                bytes[10..12].fill(0);
                let sum = !checksum::fold(checksum::sum(&bytes[..20]));
                checksum::store(&mut bytes, 10, sum);
                if let Some(transport) = Transport::of(Ipv4Packet::parse(&bytes).unwrap()) {
                    let at = transport.start + transport.checksum_offset();
                    let partial = unfinished(bytes.clone());
                    let value = transport.finished(Ipv4Packet::parse(&partial).unwrap());
                    checksum::store(&mut bytes, at, value);
                }
                match one.oddity {
                    9 if !payload.is_empty() => *bytes.last_mut().unwrap() ^= 1, // corrupt payload
                    10 => bytes[10] ^= 1,                                        // corrupt header checksum
                    11 if !one.tcp => bytes[26..28].fill(0),                     // no checksum
                    12 => bytes = unfinished_or(bytes),
                    _ => {}
                }
                bytes
            })
            .collect()
    }

    fn unfinished_or(bytes: Vec<u8>) -> Vec<u8> {
        match Transport::of(Ipv4Packet::parse(&bytes).unwrap()) {
            Some(_) => unfinished(bytes),
            None => bytes,
        }
    }

    /// Source address, protocol and ports: enough to tell our flows apart.
    fn flow(packet: &[u8]) -> (u8, u8, [u8; 4]) {
        (
            packet[15],
            packet[9],
            [packet[20], packet[21], packet[22], packet[23]],
        )
    }

    /// With DF set ids mean nothing (RFC 6864), and the header checksum covers them.
    fn without_free_id(packet: &[u8]) -> Vec<u8> {
        let mut packet = packet.to_vec();
        if packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        packet
    }

    proptest! {
        #[test]
        fn cutting_again_gives_each_flows_packets_back_in_order(plan in prop::collection::vec(made(), 0..120)) {
            let packets = stream(&plan);
            let written = coalesce(ALL, &packets);
            let again: Vec<Vec<u8>> = written.iter().flat_map(cut).collect();
            prop_assert_eq!(again.len(), packets.len(), "nothing lost, nothing invented");
            prop_assert_eq!(written.iter().map(|one| one.packets).sum::<usize>(), packets.len());
            let flows: std::collections::BTreeSet<_> = packets.iter().map(|packet| flow(packet)).collect();
            for key in flows {
                let of = |list: &[Vec<u8>]| -> Vec<Vec<u8>> {
                    list.iter().filter(|packet| flow(packet) == key).map(|packet| without_free_id(packet)).collect()
                };
                prop_assert_eq!(of(&again), of(&packets));
            }
            for one in &written {
                if one.packets > 1 {
                    prop_assert!(one.packets <= MAX_SEGMENTS && one.bytes.len() <= MAX_BYTES);
                }
            }
        }

        #[test]
        fn corrupt_packets_come_out_untouched(
            plan in prop::collection::vec(made(), 1..40), at in any::<prop::sample::Index>(), bit in 0..8
        ) {
            let mut packets = stream(&plan);
            let victim = at.index(packets.len());
            let place = at.index(packets[victim].len() - 20) + 20;
            packets[victim][place] ^= 1_u8 << bit;
            let written = coalesce(ALL, &packets);
            let untouched = written.iter().any(|one| one.packets == 1 && one.bytes == packets[victim]);
            let checkless = packets[victim][9] == UDP && packets[victim][26..28] == [0, 0];
            prop_assert!(untouched || checkless);
        }
    }

    fn run_of(n: usize, len: usize) -> Vec<Vec<u8>> {
        stream(&vec![
            Made {
                flow: 1,
                tcp: true,
                len,
                flags: ACK,
                oddity: 0
            };
            n
        ])
    }

    #[test]
    fn a_stream_becomes_one_super_packet() {
        let written = coalesce(ALL, &run_of(44, 1432));
        assert_eq!(written.len(), 1);
        assert_eq!(written[0].bytes.len(), 40 + 44 * 1432);
    }

    #[test]
    fn runs_end_at_the_limits() {
        let sizes = |n, len| {
            coalesce(ALL, &run_of(n, len))
                .iter()
                .map(|one| one.packets)
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(100, 100), [64, 36]);
        assert_eq!(sizes(50, 1432), [45, 5]);
    }

    #[test]
    fn a_lone_packet_is_written_as_it_came() {
        let packets = run_of(1, 100);
        let written = coalesce(ALL, &packets);
        assert_eq!(
            (written[0].header, &written[0].bytes),
            (Header::default(), &packets[0])
        );
    }

    #[test]
    fn interleaved_flows_merge_each_for_itself() {
        let plan: Vec<Made> = (0..30)
            .map(|n| Made {
                flow: n % 3,
                tcp: true,
                len: 100,
                flags: ACK,
                oddity: 0,
            })
            .collect();
        assert_eq!(coalesce(ALL, &stream(&plan)).len(), 3);
    }

    #[test]
    fn each_kind_has_its_switch_and_tunnels_are_left_alone() {
        let udp = |oddity| {
            stream(&vec![
                Made {
                    flow: 1,
                    tcp: false,
                    len: 100,
                    flags: 0,
                    oddity
                };
                10
            ])
        };
        assert_eq!(coalesce(ALL, &udp(0)).len(), 1);
        assert_eq!(coalesce(ALL, &udp(2)).len(), 10, "VXLAN");
        assert_eq!(coalesce(Kinds { udp: false, ..ALL }, &udp(0)).len(), 10);
        assert_eq!(coalesce(Kinds { tcp: false, ..ALL }, &run_of(10, 100)).len(), 10);
    }

    #[test]
    fn push_ends_a_run_and_survives() {
        let flags = [ACK, ACK | PSH, ACK, ACK];
        let plan: Vec<Made> = flags
            .map(|flags| Made {
                flow: 1,
                tcp: true,
                len: 100,
                flags,
                oddity: 0,
            })
            .to_vec();
        let written = coalesce(ALL, &stream(&plan));
        assert_eq!(written.iter().map(|one| one.packets).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(written[0].bytes[33], ACK | PSH);
    }

    #[test]
    fn what_is_no_packet_passes_through() {
        let junk = vec![vec![1, 2, 3], valid(UDP, b"x"), vec![]];
        let mut coalescer = Coalescer::new(ALL);
        let buffer = junk.concat();
        let mut at = 0;
        for one in &junk {
            coalescer.push(
                &buffer,
                Part {
                    start: at,
                    len: one.len(),
                },
            );
            at += one.len();
        }
        let mut seen = Vec::new();
        let drained = coalescer.drain(&buffer, |output| {
            seen.push(output.singly().map(<[u8]>::to_vec).collect::<Vec<_>>().concat());
            Ok::<(), ()>(())
        });
        drained.unwrap();
        assert_eq!(seen, junk);
    }
}
