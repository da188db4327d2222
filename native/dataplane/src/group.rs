//! Packing packets into datagrams for `sendmmsg`: consecutive packets of one size to one peer become one message,
//! which the kernel (or the network card) cuts up again (`UDP_SEGMENT`, Linux 4.18).

use std::net::Ipv4Addr;

use crate::sys::{Message, Part};

/// Bytes of one message: 65,507 fit a UDP datagram, and the kernel's own headers must still fit 16 bits.
pub const MAX_BYTES: usize = 65_000;

/// Packets waiting to be sent.
#[derive(Debug, Default)]
pub struct Groups {
    /// Packets per message at most; 1 where segmentation is not to be had.
    limit: usize,
    parts: Vec<Part>,
    messages: Vec<Message>,
    /// About the last message: bytes and packets so far, and whether a shorter packet has closed it.
    bytes: usize,
    packets: usize,
    closed: bool,
}

impl Groups {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Adds one packet, made of `parts`.
    pub fn push(&mut self, to: Ipv4Addr, parts: &[Part]) {
        let len: usize = parts.iter().map(|part| part.len).sum();
        let at = self.parts.len();
        // Empty parts would blur where a packet ends.
        self.parts.extend(parts.iter().filter(|part| part.len > 0));
        if let Some(last) = self.messages.last_mut()
            && last.to == to
            && !self.closed
            && len > 0
            && len <= usize::from(last.segment_size)
            && self.packets < self.limit
            && self.bytes + len <= MAX_BYTES
        {
            self.closed = len < usize::from(last.segment_size);
            last.parts.end = self.parts.len();
            self.bytes += len;
            self.packets += 1;
        } else {
            // A packet is at most 65,535 bytes long.
            self.messages.push(Message {
                to,
                parts: at..self.parts.len(),
                segment_size: len as u16,
            });
            (self.bytes, self.packets, self.closed) = (len, 1, false);
        }
    }

    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub fn clear(&mut self) {
        self.parts.clear();
        self.messages.clear();
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

    proptest! {
        #[test]
        fn groups_keep_to_the_kernels_limits_and_ungrouping_gives_the_packets_back(
            limit in prop_oneof![Just(1_usize), Just(63), Just(64), Just(127), Just(128)],
            mtu in 68_u32..9000,
            packets in prop::collection::vec((0_u32..3, any::<prop::sample::Index>(), 0_usize..4, any::<bool>()), 0..400),
        ) {
            let mut groups = Groups::new(limit);
            let mut wanted = Vec::new();
            let mut at = 0;
            for (peer, len, full, split) in packets {
                let len = if full > 0 { mtu as usize } else { 20 + len.index(mtu as usize - 19) };
                let parts = if split { vec![Part { start: at, len: 20 }, Part { start: at + 20, len: len - 20 }] }
                            else { vec![Part { start: at, len }] };
                at += len;
                let to = Ipv4Addr::from_bits(peer);
                groups.push(to, &parts);
                wanted.push((to, parts.into_iter().filter(|part| part.len > 0).collect::<Vec<_>>()));
            }
            let mut got = Vec::new();
            for message in groups.messages() {
                let (bytes, packets) = groups.size(message);
                prop_assert!(bytes <= MAX_BYTES);
                prop_assert!(packets <= limit);
                prop_assert!(message.parts.len() <= 1024);
                let single = groups.singly(message);
                prop_assert_eq!(single.len(), packets);
                for (n, one) in single.iter().enumerate() {
                    let full = groups.size(one).0 == usize::from(message.segment_size);
                    prop_assert!(full || n + 1 == packets, "only the last may be shorter");
                    got.push((one.to, groups.parts()[one.parts.clone()].to_vec()));
                }
            }
            prop_assert_eq!(got, wanted);
        }
    }

    #[test]
    fn a_stream_of_full_packets_is_one_message_up_to_the_limits() {
        let to = Ipv4Addr::LOCALHOST;
        let mut groups = Groups::new(128);
        for n in 0..45 {
            groups.push(
                to,
                &[Part {
                    start: n * 1472,
                    len: 1472,
                }],
            );
        }
        assert_eq!(groups.messages().len(), 2, "44 * 1472 = 64,768");
        groups.clear();
        assert_eq!((groups.messages().len(), groups.parts().len()), (0, 0));
    }
}
