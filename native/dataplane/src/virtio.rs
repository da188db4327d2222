//! `struct virtio_net_hdr`, which a TUN opened with `IFF_VNET_HDR` puts before each packet.
//!
//! Native byte order (no `TUNSETVNETLE`). What we read from it is checked against the packet before use: the
//! kernel is trusted, a test's socketpair and a fuzzer are not.

use crate::packet::{Ipv4Packet, TCP, UDP};
use crate::transport::{Transport, finish};

/// Bytes of the header; set with `TUNSETVNETHDRSZ`.
pub const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
/// Linux 6.2.
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// What the kernel left for us to do with a packet from the TUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    Nothing,
    /// Sum up from `start` to the end, the present value of the field at `field` included, and store it there.
    Checksum {
        start: usize,
        field: usize,
    },
    /// Cut the payload into pieces of `size` bytes, each behind its own header.
    Segment {
        transport: Transport,
        size: usize,
    },
}

impl Header {
    pub fn parse(bytes: &[u8; LEN]) -> Self {
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: number(2),
            gso_size: number(4),
            csum_start: number(6),
            csum_offset: number(8),
        }
    }

    pub fn format(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, number) in [
            (2, self.hdr_len),
            (4, self.gso_size),
            (6, self.csum_start),
            (8, self.csum_offset),
        ] {
            bytes[at..at + 2].copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    /// What is to be done with `packet`; None if the header does not fit it. `hdr_len` is not looked at: when the
    /// kernel forwards, it can be the whole first packet.
    pub fn task(self, packet: Ipv4Packet<'_>) -> Option<Task> {
        let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
        if self.gso_type == GSO_NONE {
            if self.flags & NEEDS_CSUM == 0 {
                return Some(Task::Nothing);
            }
            let inside = start >= packet.header_len() && start + offset + 2 <= packet.bytes().len();
            return inside.then_some(Task::Checksum {
                start,
                field: start + offset,
            });
        }
        let transport = Transport::of(packet)?;
        let protocol = match self.gso_type & !GSO_ECN {
            GSO_TCPV4 => TCP,
            GSO_UDP_L4 => UDP,
            _ => return None,
        };
        let fits = self.flags & NEEDS_CSUM != 0
            && self.gso_size > 0
            && protocol == transport.protocol
            && start == transport.start
            && offset == transport.checksum_offset();
        fits.then_some(Task::Segment {
            transport,
            size: usize::from(self.gso_size),
        })
    }

    /// Where the kernel is asked to finish a checksum: sum from here, store there.
    pub fn checksum_field(self) -> Option<(usize, usize)> {
        let start = usize::from(self.csum_start);
        (self.flags & NEEDS_CSUM != 0).then(|| (start, start + usize::from(self.csum_offset)))
    }

    /// For a packet whose checksum field holds the pseudo header's sum only.
    pub fn needs_checksum(transport: Transport) -> Self {
        Self {
            flags: NEEDS_CSUM,
            csum_start: transport.start as u16, // at most 60
            csum_offset: transport.checksum_offset() as u16,
            ..Self::default()
        }
    }

    /// For a super-packet of pieces of `size` bytes, its checksum field as for `needs_checksum`.
    pub fn super_packet(transport: Transport, size: u16) -> Self {
        Self {
            gso_type: if transport.protocol == TCP {
                GSO_TCPV4
            } else {
                GSO_UDP_L4
            },
            hdr_len: transport.end as u16, // at most 120
            gso_size: size,
            ..Self::needs_checksum(transport)
        }
    }
}

/// What belongs into the checksum field of a packet of which `Task::Checksum` said to sum up from `start`.
pub fn completed(packet: &[u8], start: usize) -> u16 {
    finish(crate::checksum::sum(&packet[start..]), packet[9])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::tests::{unfinished, valid};

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let packet = valid(TCP, &[1; 100]);
        let transport = Transport::of(Ipv4Packet::parse(&packet).unwrap()).unwrap();
        let header = Header::super_packet(transport, 40);
        assert_eq!(Header::parse(&header.format()), header);
        let packet = Ipv4Packet::parse(&packet).unwrap();
        assert_eq!(header.task(packet), Some(Task::Segment { transport, size: 40 }));
        assert_eq!(Header::default().format(), [0; LEN]);
        assert_eq!(Header::default().task(packet), Some(Task::Nothing));
    }

    #[test]
    fn a_header_that_does_not_fit_its_packet_is_refused() {
        let packet = valid(TCP, &[1; 100]);
        let packet = Ipv4Packet::parse(&packet).unwrap();
        let good = Header::super_packet(Transport::of(packet).unwrap(), 40);
        for bad in [
            Header { gso_size: 0, ..good },
            Header {
                gso_type: GSO_UDP_L4,
                ..good
            },
            Header { gso_type: 4, ..good },
            Header { gso_type: 99, ..good },
            Header { flags: 0, ..good },
            Header {
                csum_start: 24,
                ..good
            },
            Header {
                csum_offset: 6,
                ..good
            },
            Header {
                gso_type: GSO_NONE,
                csum_start: 139,
                ..good
            },
            Header {
                gso_type: GSO_NONE,
                csum_start: 0,
                ..good
            },
            Header {
                gso_type: GSO_NONE,
                csum_offset: u16::MAX,
                csum_start: u16::MAX,
                ..good
            },
        ] {
            assert_eq!(bad.task(packet), None, "{bad:?}");
        }
        assert!(
            Header {
                gso_type: GSO_TCPV4 | GSO_ECN,
                ..good
            }
            .task(packet)
            .is_some()
        );
        assert!(
            Header {
                hdr_len: u16::MAX,
                ..good
            }
            .task(packet)
            .is_some(),
            "hdr_len is not trusted"
        );
    }

    proptest! {
        #[test]
        fn no_header_makes_completing_panic(
            header in any::<[u8; LEN]>(), payload in prop::collection::vec(any::<u8>(), 0..50)
        ) {
            let mut bytes = valid(UDP, &payload);
            let header = Header::parse(&header);
            if let Some(Task::Checksum { start, field }) = header.task(Ipv4Packet::parse(&bytes).unwrap()) {
                let value = completed(&bytes, start);
                crate::checksum::store(&mut bytes, field, value);
            }
        }

        #[test]
        fn completing_gives_the_senders_packet(
            protocol in prop_oneof![Just(TCP), Just(UDP)], payload in prop::collection::vec(any::<u8>(), 0..2000)
        ) {
            let whole = valid(protocol, &payload);
            let mut bytes = unfinished(whole.clone());
            let packet = Ipv4Packet::parse(&bytes).unwrap();
            let header = Header::needs_checksum(Transport::of(packet).unwrap());
            let Some(Task::Checksum { start, field }) = header.task(packet) else { panic!("{header:?}") };
            let value = completed(&bytes, start);
                crate::checksum::store(&mut bytes, field, value);
            prop_assert_eq!(bytes, whole);
        }
    }
}
