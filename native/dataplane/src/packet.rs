//! Checked views over packets: the length is looked at once, then no accessor can panic.

use std::net::Ipv4Addr;

use crate::counters::Reason;

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER: usize = 20;
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// A whole IPv4 packet: version 4, a header that fits, and a total length equal to the bytes at hand (RFC 791).
/// The header checksum is not verified: the kernel does that on the way in, and made it on the way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Packet<'a>(&'a [u8]);

impl<'a> Ipv4Packet<'a> {
    /// The view, or why these bytes are no such packet: `Short`, `BadVersion` or `BadLength`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Reason> {
        if bytes.len() < IPV4_HEADER {
            return Err(Reason::Short);
        }
        if bytes[0] >> 4 != 4 {
            return Err(Reason::BadVersion);
        }
        let header = usize::from(bytes[0] & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        if header < IPV4_HEADER || header > bytes.len() || total != bytes.len() {
            return Err(Reason::BadLength);
        }
        Ok(Self(bytes))
    }

    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// Bytes of the header, options included: 20 to 60.
    pub fn header_len(self) -> usize {
        usize::from(self.0[0] & 0x0f) * 4
    }

    pub fn protocol(self) -> u8 {
        self.0[9]
    }

    pub fn source(self) -> Ipv4Addr {
        Ipv4Addr::new(self.0[12], self.0[13], self.0[14], self.0[15])
    }

    pub fn destination(self) -> Ipv4Addr {
        Ipv4Addr::new(self.0[16], self.0[17], self.0[18], self.0[19])
    }

    /// In units of 8 bytes; not 0 means that this is a fragment other than the first.
    pub fn fragment_offset(self) -> u16 {
        u16::from_be_bytes([self.0[6], self.0[7]]) & 0x1fff
    }

    /// Any fragment, the first included.
    pub fn is_fragment(self) -> bool {
        u16::from_be_bytes([self.0[6], self.0[7]]) & 0x3fff != 0
    }

    pub fn payload(self) -> &'a [u8] {
        &self.0[self.header_len()..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[0] = 0x45;
        bytes[3] = 24;
        bytes
    }

    #[test]
    fn a_packet_is_as_long_as_it_says() {
        assert_eq!(Ipv4Packet::parse(&packet()).unwrap().payload().len(), 4);
        assert_eq!(Ipv4Packet::parse(&packet()[..23]), Err(Reason::BadLength));
        assert_eq!(
            Ipv4Packet::parse(&[packet(), vec![0]].concat()),
            Err(Reason::BadLength)
        );
        assert_eq!(Ipv4Packet::parse(&packet()[..19]), Err(Reason::Short));
        assert_eq!(Ipv4Packet::parse(&[]), Err(Reason::Short));
    }

    #[test]
    fn the_header_has_five_words_at_least_and_lies_inside_the_packet() {
        let mut bytes = packet();
        bytes[0] = 0x44;
        assert_eq!(Ipv4Packet::parse(&bytes), Err(Reason::BadLength));
        bytes[0] = 0x47;
        assert_eq!(Ipv4Packet::parse(&bytes), Err(Reason::BadLength));
        bytes[0] = 0x46;
        assert_eq!(Ipv4Packet::parse(&bytes).unwrap().header_len(), 24);
    }

    #[test]
    fn only_version_four_is_ipv4() {
        let mut bytes = packet();
        bytes[0] = 0x65;
        assert_eq!(Ipv4Packet::parse(&bytes), Err(Reason::BadVersion));
    }
}
