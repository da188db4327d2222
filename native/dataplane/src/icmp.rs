//! The one ICMP message we write: net unreachable (RFC 792, type 3 code 0).

use std::net::Ipv4Addr;

use crate::checksum;
use crate::packet::{ICMP, IPV4_HEADER, Ipv4Packet};

/// "As much of the original datagram as possible without the length of the ICMP datagram exceeding 576 bytes"
/// (RFC 1812, section 4.3.2.3).
pub const MAX_LEN: usize = 576;
const ICMP_HEADER: usize = 8;
const DESTINATION_UNREACHABLE: u8 = 3;
const NET_UNREACHABLE: u8 = 0;

/// An answer to the sender of `about`, from `source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unreachable<'a> {
    pub source: Ipv4Addr,
    pub about: Ipv4Packet<'a>,
}

impl Unreachable<'_> {
    /// Writes the whole IPv4 packet and returns its length.
    pub fn write(&self, out: &mut [u8; MAX_LEN]) -> usize {
        let quoted = self.about.bytes().len().min(MAX_LEN - IPV4_HEADER - ICMP_HEADER);
        let length = IPV4_HEADER + ICMP_HEADER + quoted;
        let (ip, icmp) = out[..length].split_at_mut(IPV4_HEADER);

        ip.fill(0);
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&(length as u16).to_be_bytes()); // at most 576
        ip[8] = 64;
        ip[9] = ICMP;
        ip[12..16].copy_from_slice(&self.source.octets());
        ip[16..20].copy_from_slice(&self.about.source().octets());
        checksum::store(ip, 10, !checksum::fold(checksum::sum(ip)));

        icmp[..ICMP_HEADER].fill(0);
        icmp[0] = DESTINATION_UNREACHABLE;
        icmp[1] = NET_UNREACHABLE;
        icmp[ICMP_HEADER..].copy_from_slice(&self.about.bytes()[..quoted]);
        checksum::store(icmp, 2, !checksum::fold(checksum::sum(icmp)));
        length
    }
}

/// May an ICMP error be sent about `packet`? RFC 1122 section 3.2.2 forbids it about ICMP errors, later fragments,
/// and sources or destinations that name no single host.
pub fn may_answer(packet: Ipv4Packet<'_>) -> bool {
    let source = packet.source();
    // 240.0.0.0/4 holds 255.255.255.255 and nothing that could receive an answer.
    let one_host = |address: Ipv4Addr| address.octets()[0] < 224 && !address.is_unspecified();
    if packet.fragment_offset() != 0
        || !one_host(source)
        || source.is_loopback()
        || !one_host(packet.destination())
    {
        return false;
    }
    packet.protocol() != ICMP || packet.payload().first().is_some_and(|kind| is_query(*kind))
}

/// Echo, timestamp, information, address mask: everything else is an error, or unknown and treated as one, as
/// Linux does (`net/ipv4/icmp.c: __icmp_send`).
fn is_query(kind: u8) -> bool {
    matches!(kind, 0 | 8 | 13..=18)
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv4Type, SlicedPacket, TransportSlice};

    use super::*;

    fn udp(payload: usize) -> Vec<u8> {
        let builder = etherparse::PacketBuilder::ipv4([172, 17, 41, 5], [172, 17, 200, 1], 9).udp(7, 9);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &vec![0xab; payload]).unwrap();
        bytes
    }

    fn answer(about: &[u8]) -> Vec<u8> {
        let mut out = [0xee; MAX_LEN];
        let about = Ipv4Packet::parse(about).unwrap();
        let length = Unreachable {
            source: Ipv4Addr::new(172, 17, 200, 0),
            about,
        }
        .write(&mut out);
        out[..length].to_vec()
    }

    #[test]
    fn the_answer_is_valid_and_quotes_the_packet() {
        for payload in [0, 1, 100, 520, 521, 1400] {
            let about = udp(payload);
            let bytes = answer(&about);
            assert_eq!(bytes.len(), (28 + about.len()).min(576));
            let sliced = SlicedPacket::from_ip(&bytes).unwrap();
            let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else {
                panic!("no ICMP")
            };
            assert!(
                matches!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(_)),
                "{:?}",
                icmp.icmp_type()
            );
            assert_eq!(icmp.payload(), &about[..bytes.len() - 28]);
            assert_eq!(checksum::fold(checksum::sum(&bytes[..20])), 0xffff);
            assert_eq!(checksum::fold(checksum::sum(&bytes[20..])), 0xffff);
            assert_eq!(&bytes[12..20], &[172, 17, 200, 0, 172, 17, 41, 5]);
        }
    }

    #[test]
    fn no_answer_about_errors_fragments_or_sources_that_are_no_host() {
        let ok = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = udp(4);
            change(&mut bytes);
            may_answer(Ipv4Packet::parse(&bytes).unwrap())
        };
        assert!(ok(&|_| {}));
        assert!(ok(&|b| b[6] = 0x20), "the first fragment is answered");
        assert!(!ok(&|b| b[7] = 1), "later fragments are not");
        assert!(!ok(&|b| b[12..16].copy_from_slice(&[0; 4])));
        assert!(!ok(&|b| b[12..16].copy_from_slice(&[255; 4])));
        assert!(!ok(&|b| b[12] = 224));
        assert!(!ok(&|b| b[12] = 127));
        assert!(!ok(&|b| b[16] = 239));
        assert!(!ok(&|b| b[16..20].copy_from_slice(&[255; 4])));
        for (kind, wanted) in [
            (0, true),
            (8, true),
            (13, true),
            (3, false),
            (5, false),
            (11, false),
            (65, false),
        ] {
            assert_eq!(
                ok(&|b| {
                    b[9] = ICMP;
                    b[20] = kind;
                }),
                wanted,
                "ICMP type {kind}"
            );
        }
    }
}
