//! Packing packets into datagrams for `sendmmsg`: packets of one size to one peer become one message, which the kernel
//! (or the network card) cuts up again (`UDP_SEGMENT`, Linux 4.18).
//!
//! Only the last packet of a message may be shorter, so flows of many sizes would make messages of one or two packets.
//! Therefore a packet may also join an earlier message of the burst, before packets of *other* flows: packets of one
//! flow keep their order, others had none among them.

use std::net::Ipv4Addr;

use crate::sys::{Message, Part};

/// Bytes of one message: 65,507 fit a UDP datagram, and the kernel's own headers must still fit 16 bits.
pub const MAX_BYTES: usize = 65_000;
/// How many messages a packet looks at.
const WINDOW: usize = 32;

/// A flow, or all of those that share its hash: their packets keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow(u8);

impl Flow {
    pub const COUNT: usize = 256;

    /// From a hash of which the highest bits are the best.
    pub fn of(hash: u64) -> Self {
        Self((hash >> 56) as u8)
    }

    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Where a packet lies: written header and payload, or all in one.
#[derive(Debug, Clone, Copy)]
struct Packet {
    message: usize,
    parts: [Part; 2],
}

/// A message that is being filled.
#[derive(Debug, Clone, Copy)]
struct Filling {
    to: Ipv4Addr,
    size: usize,
    bytes: usize,
    packets: usize,
    /// A shorter packet was its last.
    closed: bool,
}

/// Packets waiting to be sent.
#[derive(Debug)]
pub struct Groups {
    /// Packets per message at most; 1 where segmentation is not to be had.
    limit: usize,
    packets: Vec<Packet>,
    filling: Vec<Filling>,
    /// For each flow, the message that holds its last packet; no later packet of it may be in an earlier one.
    last: [usize; Flow::COUNT],
    /// The same for every flow: set by packets that could belong to any.
    floor: usize,
    /// What [`Self::pack`] makes of it.
    parts: Vec<Part>,
    messages: Vec<Message>,
}

const EMPTY: Part = Part { start: 0, len: 0 };

impl Groups {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            packets: Vec::new(),
            filling: Vec::new(),
            last: [0; Flow::COUNT],
            floor: 0,
            parts: Vec::new(),
            messages: Vec::new(),
        }
    }

    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Adds one packet, made of one part or two. No `flow`: it stays behind all before it and before all after it.
    pub fn push(&mut self, to: Ipv4Addr, flow: Option<Flow>, head: Part, payload: Option<Part>) {
        let parts = [head, payload.unwrap_or(EMPTY)];
        let len = parts[0].len + parts[1].len;
        let earliest = match flow {
            Some(flow) => self.last[flow.index()].max(self.floor),
            None => self.filling.len(),
        };
        let message = self.fitting(to, len, earliest).unwrap_or(self.filling.len());
        if let Some(found) = self.filling.get_mut(message) {
            found.closed = len < found.size;
            found.bytes += len;
            found.packets += 1;
        } else {
            self.filling.push(Filling {
                to,
                size: len,
                bytes: len,
                packets: 1,
                closed: len == 0, // an empty datagram cannot be cut off another
            });
        }
        match flow {
            Some(flow) => self.last[flow.index()] = message,
            None => self.floor = message,
        }
        self.packets.push(Packet { message, parts });
    }

    /// The message, not before `earliest`, with the least room left over for each packet: one of the same size if there
    /// is any, and the newest of several.
    fn fitting(&self, to: Ipv4Addr, len: usize, earliest: usize) -> Option<usize> {
        if self.limit < 2 || len == 0 {
            return None;
        }
        let begin = earliest.max(self.filling.len().saturating_sub(WINDOW));
        let mut best: Option<(usize, usize)> = None; // size and index
        for (at, one) in self.filling.iter().enumerate().skip(begin).rev() {
            let fits = !one.closed
                && len <= one.size
                && one.to == to
                && one.packets < self.limit
                && one.bytes + len <= MAX_BYTES;
            if fits && best.is_none_or(|(size, _)| one.size < size) {
                best = Some((one.size, at));
                if one.size == len {
                    break;
                }
            }
        }
        best.map(|(_, at)| at)
    }

    /// Puts everything into messages, in the order to send them.
    pub fn pack(&mut self) {
        self.parts.clear();
        self.messages.clear();
        // A stable sort by message keeps the order inside each; it is sorted already unless packets have moved.
        self.packets.sort_by_key(|packet| packet.message);
        for packet in &self.packets {
            let at = self.parts.len();
            // Empty parts would blur where a packet ends.
            self.parts.extend(packet.parts.iter().filter(|part| part.len > 0));
            if packet.message == self.messages.len() {
                let filling = &self.filling[packet.message];
                self.messages.push(Message {
                    to: filling.to,
                    parts: at..at,
                    segment_size: filling.size as u16, // a packet is at most 65,535 bytes long
                });
            }
            if let Some(message) = self.messages.last_mut() {
                message.parts.end = self.parts.len();
            }
        }
    }

    /// As of the last [`Self::pack`].
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub fn clear(&mut self) {
        self.packets.clear();
        self.filling.clear();
        self.parts.clear();
        self.messages.clear();
        self.last = [0; Flow::COUNT];
        self.floor = 0;
    }

    /// Bytes of a message, and how many packets that makes.
    pub fn size(&self, message: &Message) -> (usize, usize) {
        let bytes = self.parts[message.parts.clone()]
            .iter()
            .map(|part| part.len)
            .sum::<usize>();
        (
            bytes,
            bytes.div_ceil(usize::from(message.segment_size).max(1)).max(1),
        )
    }

    /// The same packets, each its own message.
    pub fn singly(&self, message: &Message) -> Vec<Message> {
        let mut single = Vec::new();
        let (mut start, mut bytes) = (message.parts.start, 0);
        for at in message.parts.clone() {
            bytes += self.parts[at].len;
            if bytes == usize::from(message.segment_size) || at + 1 == message.parts.end {
                let segment_size = bytes as u16; // at most the group's
                single.push(Message {
                    to: message.to,
                    parts: start..at + 1,
                    segment_size,
                });
                (start, bytes) = (at + 1, 0);
            }
        }
        single
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Whole = (Ipv4Addr, Vec<Part>);

    /// Every packet again, in the order they leave.
    fn sent(groups: &mut Groups, limit: usize) -> Vec<Whole> {
        groups.pack();
        let mut got = Vec::new();
        for message in groups.messages() {
            let (bytes, packets) = groups.size(message);
            assert!(bytes <= MAX_BYTES);
            assert!(packets <= limit);
            assert!(message.parts.len() <= 1024);
            let single = groups.singly(message);
            assert_eq!(single.len(), packets);
            for (n, one) in single.iter().enumerate() {
                let full = groups.size(one).0 == usize::from(message.segment_size);
                assert!(full || n + 1 == packets, "only the last may be shorter");
                got.push((one.to, groups.parts()[one.parts.clone()].to_vec()));
            }
        }
        got
    }

    proptest! {
        #[test]
        fn groups_keep_to_the_kernels_limits_and_every_flow_keeps_its_order(
            limit in prop_oneof![Just(1_usize), Just(63), Just(64), Just(127), Just(128)],
            mtu in 68_u32..9000,
            packets in prop::collection::vec(
                (0_u32..3, prop::option::weighted(0.95, 0_u8..6), any::<prop::sample::Index>(), 0_usize..4, any::<bool>()),
                0..150,
            ),
        ) {
            let mut groups = Groups::new(limit);
            let mut wanted: Vec<(Option<u8>, Whole)> = Vec::new();
            let mut at = 0;
            for (peer, flow, len, full, split) in packets {
                let len = if full > 0 { mtu as usize } else { 20 + len.index(mtu as usize - 19) };
                let (head, payload) = if split {
                    (Part { start: at, len: 20 }, Some(Part { start: at + 20, len: len - 20 }))
                } else {
                    (Part { start: at, len }, None)
                };
                at += len;
                // Packets of a flow go to one place.
                let to = Ipv4Addr::from_bits(flow.map_or(peer, |flow| u32::from(flow) % 3));
                groups.push(to, flow.map(Flow), head, payload);
                let parts = [head].into_iter().chain(payload).filter(|part| part.len > 0).collect();
                wanted.push((flow, (to, parts)));
            }
            let got = sent(&mut groups, limit);
            prop_assert_eq!(got.len(), wanted.len());
            let places: Vec<Option<usize>> =
                wanted.iter().map(|(_, packet)| got.iter().position(|one| one == packet)).collect();
            for (n, (flow, _)) in wanted.iter().enumerate() {
                prop_assert!(places[n].is_some(), "lost or changed");
                for (m, (earlier, _)) in wanted[..n].iter().enumerate() {
                    if earlier == flow || earlier.is_none() || flow.is_none() {
                        prop_assert!(places[m] < places[n], "{m} before {n}");
                    }
                }
            }
        }
    }

    fn part(start: usize, len: usize) -> Part {
        Part { start, len }
    }

    #[test]
    fn a_stream_of_full_packets_is_one_message_up_to_the_limits() {
        let to = Ipv4Addr::LOCALHOST;
        let mut groups = Groups::new(128);
        for n in 0..45 {
            groups.push(to, Some(Flow(1)), part(n * 1472, 1472), None);
        }
        groups.pack();
        assert_eq!(groups.messages().len(), 2, "44 * 1472 = 64,768");
        groups.clear();
        assert_eq!((groups.messages().len(), groups.parts().len()), (0, 0));
        assert!(groups.is_empty());
    }

    #[test]
    fn flows_of_many_sizes_share_messages() {
        let to = Ipv4Addr::LOCALHOST;
        let mut groups = Groups::new(128);
        let (mut random, mut at) = (1_u32, 0);
        for n in 0..64_u8 {
            random = random.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            let len = 64 + (random >> 12) as usize % 449;
            groups.push(to, Some(Flow(n % 16)), part(at, len), None);
            at += len;
        }
        groups.pack();
        let messages = groups.messages().len();
        assert!(messages <= 40, "64 packets in {messages} messages");
    }

    #[test]
    fn two_streams_that_alternate_are_two_messages() {
        let mut groups = Groups::new(128);
        for n in 0..40_u8 {
            let to = Ipv4Addr::from_bits(u32::from(n % 2) + 1);
            groups.push(to, Some(Flow(n % 2)), part(usize::from(n) * 100, 100), None);
        }
        groups.pack();
        assert_eq!(groups.messages().len(), 2);
    }
}
