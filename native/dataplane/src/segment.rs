//! Cutting a super-packet from the TUN into packets, as a network card would (TSO, USO).
//!
//! Only headers are written; payloads stay where they are and are gathered by `sendmmsg`. One route look-up and one
//! pass over the constant part of the headers serve all segments.

use crate::checksum::{self, Sum};
use crate::packet::TCP;
use crate::sys::Part;
use crate::transport::{Transport, finish};

/// Room for one written header: 60 bytes of IPv4 and 60 of TCP at most.
pub const HEADER_ROOM: usize = 120;

const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// A super-packet half cut.
pub struct Segmenter {
    transport: Transport,
    size: usize,
    /// The headers of every segment, with the fields that vary zeroed.
    template: [u8; HEADER_ROOM],
    /// Sums over the template; over its transport part with the pseudo header less the length.
    ip_sum: Sum,
    transport_sum: Sum,
    id: u16,
    sequence: u32,
    flags: u8,
    /// Payload bytes already handed out, and where the payload lies in the buffer.
    done: usize,
    payload: Part,
    count: u16,
}

impl Segmenter {
    /// `packet` lies at `at` in the buffer; `transport` and `size` are what `virtio::Header::task` said about it.
    pub fn new(packet: &[u8], at: usize, transport: Transport, size: usize) -> Self {
        let (start, end) = (transport.start, transport.end);
        let mut template = [0; HEADER_ROOM];
        template[..end].copy_from_slice(&packet[..end]);
        let (ip, rest) = template[..end].split_at_mut(start);
        let id = u16::from_be_bytes([ip[4], ip[5]]);
        ip[2..6].fill(0); // total length, id
        ip[10..12].fill(0); // checksum
        let (mut sequence, mut flags) = (0, 0);
        if transport.protocol == TCP {
            sequence = u32::from_be_bytes([rest[4], rest[5], rest[6], rest[7]]);
            flags = rest[13];
            rest[4..8].fill(0);
            rest[13] = 0;
            rest[16..18].fill(0);
        } else {
            rest[4..8].fill(0); // length, checksum
        }
        let ip_sum = checksum::sum(ip);
        let transport_sum = checksum::pseudo_header(&ip[12..20], transport.protocol, 0) + checksum::sum(rest);
        let payload = Part {
            start: at + end,
            len: packet.len() - end,
        };
        Self {
            transport,
            size,
            template,
            ip_sum,
            transport_sum,
            id,
            sequence,
            flags,
            done: 0,
            payload,
            count: 0,
        }
    }

    /// Writes the next segment's header to the front of `header`, at least [`HEADER_ROOM`] long, and says how long
    /// it is and where its payload is. `buffer` is the one `at` was about.
    pub fn next(&mut self, buffer: &[u8], header: &mut [u8]) -> Option<(usize, Part)> {
        // A super-packet without payload is legal, if pointless: one segment.
        if self.done >= self.payload.len && self.count > 0 {
            return None;
        }
        let (start, end) = (self.transport.start, self.transport.end);
        let len = self.size.min(self.payload.len - self.done);
        let payload = Part {
            start: self.payload.start + self.done,
            len,
        };
        let last = self.done + len == self.payload.len;

        header[..end].copy_from_slice(&self.template[..end]);
        let (ip, rest) = header[..end].split_at_mut(start);
        let total = (end + len) as u16; // no more than the super-packet's own
        let id = self.id.wrapping_add(self.count);
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[4..6].copy_from_slice(&id.to_be_bytes());
        checksum::store(
            ip,
            10,
            !checksum::fold(self.ip_sum + checksum::word(total) + checksum::word(id)),
        );

        let length = total - start as u16; // an IPv4 header has 60 bytes at most
        let mut sum = self.transport_sum + checksum::word(length);
        sum += checksum::sum(&buffer[payload.start..payload.start + len]);
        if self.transport.protocol == TCP {
            let sequence = self.sequence.wrapping_add(self.done as u32); // at most 65,535
            let mut flags = self.flags;
            if !last {
                flags &= !FIN_PSH;
            }
            if self.count > 0 {
                flags &= !CWR;
            }
            rest[4..8].copy_from_slice(&sequence.to_be_bytes());
            rest[13] = flags;
            sum += checksum::sum(&sequence.to_be_bytes()) + checksum::word(u16::from(flags));
        } else {
            rest[4..6].copy_from_slice(&length.to_be_bytes());
            sum += checksum::word(length);
        }
        checksum::store(
            rest,
            self.transport.checksum_offset(),
            finish(sum, self.transport.protocol),
        );

        self.done += len;
        self.count = self.count.wrapping_add(1);
        Some((end, payload))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Ipv4Packet, UDP};

    /// All segments of `packet`, as bytes.
    pub fn segment(packet: &[u8], size: usize) -> Vec<Vec<u8>> {
        let transport = Transport::of(Ipv4Packet::parse(packet).unwrap()).unwrap();
        let mut buffer = vec![0xee; 13]; // the packet need not lie at the front
        buffer.extend_from_slice(packet);
        let mut segmenter = Segmenter::new(packet, 13, transport, size);
        let mut header = [0xdd; HEADER_ROOM];
        let mut segments = Vec::new();
        while let Some((length, payload)) = segmenter.next(&buffer, &mut header) {
            segments.push(
                [
                    &header[..length],
                    &buffer[payload.start..payload.start + payload.len],
                ]
                .concat(),
            );
        }
        segments
    }

    fn tcp(payload: &[u8], sequence: u32, flags: u8, options: bool) -> Vec<u8> {
        let mut builder =
            PacketBuilder::ipv4([172, 17, 41, 5], [172, 17, 7, 9], 63).tcp(1234, 80, sequence, 500);
        builder = builder.ack(77);
        if options {
            builder = builder
                .options_raw(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8])
                .unwrap();
        }
        let mut bytes = Vec::new();
        builder.write(&mut bytes, payload).unwrap();
        bytes[33] = flags;
        bytes
    }

    /// etherparse's own opinion of both checksums.
    fn assert_valid(bytes: &[u8]) {
        let packet = etherparse::SlicedPacket::from_ip(bytes).unwrap();
        let Some(etherparse::NetSlice::Ipv4(ip)) = &packet.net else {
            panic!("not IPv4")
        };
        let header = ip.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(usize::from(header.total_len), bytes.len());
        match packet.transport.unwrap() {
            etherparse::TransportSlice::Tcp(tcp) => {
                assert_eq!(
                    tcp.checksum(),
                    tcp.calc_checksum_ipv4(header.source, header.destination).unwrap()
                );
            }
            etherparse::TransportSlice::Udp(udp) => {
                assert_eq!(usize::from(udp.length()), bytes.len() - ip.header().slice().len());
                let computed = udp
                    .to_header()
                    .calc_checksum_ipv4(&header, udp.payload())
                    .unwrap();
                assert_eq!(udp.checksum(), computed);
            }
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn tcp_segments_are_valid_and_concatenate_to_the_original(
            payload in prop::collection::vec(any::<u8>(), 1..9000),
            size in 1_usize..2000,
            sequence in prop_oneof![any::<u32>(), Just(u32::MAX - 1000)],
            flags in any::<u8>(),
            options in any::<bool>(),
            id in any::<u16>(),
        ) {
            let size = size.max(payload.len() / 500);
            let mut packet = tcp(&payload, sequence, flags, options);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            let end = packet.len() - payload.len();
            let segments = segment(&packet, size);
            prop_assert_eq!(segments.len(), payload.len().div_ceil(size));
            for (n, one) in segments.iter().enumerate() {
                assert_valid(one);
                let last = n == segments.len() - 1;
                prop_assert_eq!(one.len() == end + size || last, true);
                prop_assert_eq!(u16::from_be_bytes([one[4], one[5]]), id.wrapping_add(n as u16));
                let number = u32::from_be_bytes([one[24], one[25], one[26], one[27]]);
                prop_assert_eq!(number, sequence.wrapping_add((n * size) as u32));
                let mut wanted = flags;
                if !last { wanted &= !FIN_PSH; }
                if n > 0 { wanted &= !CWR; }
                prop_assert_eq!(one[33], wanted);
                prop_assert_eq!(&one[34..36], &packet[34..36]);
                prop_assert_eq!(&one[38..end], &packet[38..end]);
                prop_assert_eq!(&one[6..10], &packet[6..10]);
            }
            let whole: Vec<u8> = segments.iter().flat_map(|one| one[end..].to_vec()).collect();
            prop_assert_eq!(whole, payload);
        }

        #[test]
        fn udp_segments_are_valid_and_concatenate_to_the_original(
            payload in prop::collection::vec(any::<u8>(), 1..9000), size in 1_usize..2000
        ) {
            let size = size.max(payload.len() / 500);
            let mut packet = Vec::new();
            PacketBuilder::ipv4([172, 17, 41, 5], [172, 17, 7, 9], 63).udp(7, 9).write(&mut packet, &payload).unwrap();
            let segments = segment(&packet, size);
            for one in &segments {
                assert_valid(one);
            }
            let whole: Vec<u8> = segments.iter().flat_map(|one| one[28..].to_vec()).collect();
            prop_assert_eq!(whole, payload);
        }
    }

    #[test]
    fn a_udp_checksum_is_never_zero() {
        // Search for a payload whose checksum would be zero: the sum of the rest, inverted.
        let mut packet = crate::transport::tests::valid(UDP, &[0, 0]);
        packet.truncate(30);
        for value in 0..=u16::MAX {
            packet[28..30].copy_from_slice(&value.to_be_bytes());
            let one = &segment(&packet, 2)[0];
            assert_ne!(one[26..28], [0, 0]);
        }
    }

    #[test]
    fn nothing_to_cut_is_one_segment() {
        assert_eq!(segment(&tcp(&[], 5, 0x10, false), 100).len(), 1);
    }
}
