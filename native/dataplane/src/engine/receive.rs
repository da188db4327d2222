//! UDP to TUN.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::{Fatal, Tun, is_fatal};
use crate::counters::{Reason, Tally};
use crate::forward::{self, Rules};
use crate::routes::Routes;
use crate::sys::Receiver;

/// Datagrams per round, and per system call.
const BURST: usize = 64;

pub struct Receive {
    receiver: Receiver,
}

impl Receive {
    /// Buffers for packets of `mtu` bytes: whatever is longer shows as truncated and is dropped as too big.
    pub fn new(mtu: usize) -> Self {
        Self {
            receiver: Receiver::new(BURST, mtu.next_multiple_of(64)),
        }
    }

    /// One burst. True if there was anything.
    pub fn round(
        &mut self,
        udp: &OwnedFd,
        tun: &Tun,
        routes: &Routes,
        rules: &Rules,
        tally: &mut Tally,
    ) -> Result<bool, Fatal> {
        let count = match self.receiver.receive(udp.as_fd()) {
            Ok(count) => count,
            Err(error) if is_dead(&error) => {
                return Err(Fatal::new("the UDP socket failed in receive", &error));
            }
            // Nothing there, or news about an earlier datagram (ECONNREFUSED and the like), which concern no packet.
            Err(_) => return Ok(false),
        };
        for at in 0..count {
            let datagram = self.receiver.datagram(at);
            let verdict = if datagram.truncated {
                Err(Reason::TooBig)
            } else {
                forward::from_peer(datagram.bytes, datagram.source, routes, rules)
            };
            match verdict {
                Ok(packet) => {
                    if tun.write(packet.bytes(), tally)? {
                        tally.in_packets += 1;
                        tally.in_bytes += packet.bytes().len() as u64;
                    }
                }
                Err(reason) => tally.drop(reason),
            }
        }
        Ok(true)
    }
}

/// Is the socket itself gone?
pub(super) fn is_dead(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error).is_some_and(is_fatal)
}
