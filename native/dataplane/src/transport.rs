//! The TCP or UDP header of an unfragmented packet, and the state of its checksum.

use crate::checksum::{self, Sum};
use crate::group::Flow;
use crate::packet::{Ipv4Packet, TCP, UDP};

/// Where things are in a packet. Only made for packets in which they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    pub protocol: u8,
    /// Bytes of the IPv4 header: where this one begins.
    pub start: usize,
    /// Where the payload begins.
    pub end: usize,
}

impl Transport {
    /// None for other protocols, for fragments, and when the header does not fit.
    pub fn of(packet: Ipv4Packet<'_>) -> Option<Self> {
        if packet.is_fragment() {
            return None;
        }
        let payload = packet.payload();
        let length = match packet.protocol() {
            TCP => usize::from(payload.get(12)? >> 4) * 4,
            UDP => 8,
            _ => return None,
        };
        let smallest = if packet.protocol() == TCP { 20 } else { 8 };
        if length < smallest || length > payload.len() {
            return None;
        }
        let start = packet.header_len();
        Some(Self {
            protocol: packet.protocol(),
            start,
            end: start + length,
        })
    }

    /// Addresses, ports and protocol, mixed by a multiplication.
    pub fn flow(self, packet: Ipv4Packet<'_>) -> Flow {
        let bytes = packet.bytes();
        let word = |at: usize| {
            u64::from(u32::from_ne_bytes([
                bytes[at],
                bytes[at + 1],
                bytes[at + 2],
                bytes[at + 3],
            ]))
        };
        let key = word(12) ^ word(16).rotate_left(16) ^ word(self.start) << 24 ^ u64::from(self.protocol);
        Flow::of(key.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Offset of the checksum field inside this header.
    pub fn checksum_offset(self) -> usize {
        if self.protocol == TCP { 16 } else { 6 }
    }

    fn pseudo_header(self, packet: Ipv4Packet<'_>) -> Sum {
        let bytes = packet.bytes();
        // At most 65,535 - 20, by the IPv4 length field.
        checksum::pseudo_header(&bytes[12..20], self.protocol, (bytes.len() - self.start) as u16)
    }

    /// Does the sum over everything come out right? A UDP checksum of zero (none) does not.
    pub fn checksum_holds(self, packet: Ipv4Packet<'_>) -> bool {
        let bytes = &packet.bytes()[self.start..];
        if self.protocol == UDP && bytes[6..8] == [0, 0] {
            return false;
        }
        checksum::fold(self.pseudo_header(packet) + checksum::sum(bytes)) == 0xffff
    }

    /// Did the sender leave the rest to a network card that was never there? Then the field holds the folded sum
    /// of the pseudo header and nothing else. An eBPF sender's packets arrive so over veth, because nothing on the
    /// way computes inner checksums: unless we do, TCP stalls completely. One corrupt packet in 65,536 looks the
    /// same by chance.
    pub fn is_unfinished(self, packet: Ipv4Packet<'_>) -> bool {
        // The cheap comparison first; it fails for all but one finished packet in 65,536.
        self.looks_unfinished(packet) && !self.checksum_holds(packet)
    }

    /// The same without the sum, for a packet that nobody can have finished, as it is yet to be cut: one in 65,536 of
    /// those has by chance the checksum that its bytes would have.
    pub fn looks_unfinished(self, packet: Ipv4Packet<'_>) -> bool {
        let at = self.start + self.checksum_offset();
        let field = u16::from_ne_bytes([packet.bytes()[at], packet.bytes()[at + 1]]);
        field == checksum::fold(self.pseudo_header(packet))
    }

    /// What the field should hold, given that it is unfinished.
    pub fn finished(self, packet: Ipv4Packet<'_>) -> u16 {
        finish(checksum::sum(&packet.bytes()[self.start..]), self.protocol)
    }
}

/// The checksum of a sum: inverted, and for UDP never zero, which would mean "none" (RFC 768).
pub fn finish(sum: Sum, protocol: u8) -> u16 {
    match !checksum::fold(sum) {
        0 if protocol == UDP => 0xffff,
        value => value,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    /// A valid TCP or UDP packet made by etherparse.
    pub fn valid(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let ip = PacketBuilder::ipv4([172, 17, 7, 9], [172, 17, 41, 5], 64);
        let mut bytes = Vec::new();
        if protocol == TCP {
            ip.tcp(1234, 80, 1000, 65535)
                .ack(7)
                .write(&mut bytes, payload)
                .unwrap();
        } else {
            ip.udp(1234, 53).write(&mut bytes, payload).unwrap();
        }
        bytes
    }

    /// The same packet as a kernel leaves it to a network card: the pseudo header's sum in the checksum field.
    pub fn unfinished(mut bytes: Vec<u8>) -> Vec<u8> {
        let packet = Ipv4Packet::parse(&bytes).unwrap();
        let transport = Transport::of(packet).unwrap();
        let sum = checksum::fold(transport.pseudo_header(packet));
        checksum::store(&mut bytes, transport.start + transport.checksum_offset(), sum);
        bytes
    }

    proptest! {
        #[test]
        fn completing_equals_computing(
            protocol in prop_oneof![Just(TCP), Just(UDP)], payload in prop::collection::vec(any::<u8>(), 1..2000)
        ) {
            let whole = valid(protocol, &payload);
            let packet = Ipv4Packet::parse(&whole).unwrap();
            let transport = Transport::of(packet).unwrap();
            prop_assert!(transport.checksum_holds(packet));
            prop_assert!(!transport.is_unfinished(packet));

            let mut partial = unfinished(whole.clone());
            let packet = Ipv4Packet::parse(&partial).unwrap();
            prop_assume!(!transport.checksum_holds(packet)); // the payload may happen to sum up to nothing
            prop_assert!(transport.is_unfinished(packet));
            let value = transport.finished(packet);
            checksum::store(&mut partial, transport.start + transport.checksum_offset(), value);
            prop_assert_eq!(partial, whole);
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 20..120), protocol in prop_oneof![Just(TCP), Just(UDP)]) {
            let mut bytes = bytes;
            bytes[0] = 0x40 | (bytes[0] & 0x0f).max(5);
            bytes[3] = bytes.len() as u8;
            bytes[2] = 0;
            bytes[6] &= 0xc0;
            bytes[7] = 0;
            bytes[9] = protocol;
            let Ok(packet) = Ipv4Packet::parse(&bytes) else { return Ok(()) };
            let Some(transport) = Transport::of(packet) else { return Ok(()) };
            prop_assert!(transport.end <= bytes.len());
            prop_assert!(!(transport.checksum_holds(packet) && transport.is_unfinished(packet)));
            transport.finished(packet);
        }
    }

    #[test]
    fn fragments_and_other_protocols_have_none() {
        let mut bytes = valid(UDP, b"x");
        bytes[6] = 0x20;
        assert_eq!(Transport::of(Ipv4Packet::parse(&bytes).unwrap()), None);
        bytes[6..8].copy_from_slice(&[0, 1]);
        assert_eq!(Transport::of(Ipv4Packet::parse(&bytes).unwrap()), None);
        bytes[7] = 0;
        bytes[9] = 47;
        assert_eq!(Transport::of(Ipv4Packet::parse(&bytes).unwrap()), None);
    }

    #[test]
    fn a_udp_packet_without_checksum_neither_holds_nor_is_unfinished() {
        let mut bytes = valid(UDP, b"x");
        bytes[26..28].fill(0);
        let packet = Ipv4Packet::parse(&bytes).unwrap();
        let transport = Transport::of(packet).unwrap();
        assert!(!transport.checksum_holds(packet) && !transport.is_unfinished(packet));
    }
}
