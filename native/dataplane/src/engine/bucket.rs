//! A token bucket for the ICMP answers.

use std::time::{Duration, Instant};

/// Answers per second, and as many at once after a quiet second.
const RATE: u32 = 100;

#[derive(Debug)]
pub struct Bucket {
    tokens: u32,
    /// The tokens are right as of this instant.
    filled: Instant,
}

impl Bucket {
    pub fn new(now: Instant) -> Self {
        Self {
            tokens: RATE,
            filled: now,
        }
    }

    /// Takes a token if there is one. `now` must not go back.
    pub fn take(&mut self, now: Instant) -> bool {
        let each = Duration::from_secs(1) / RATE;
        let due = now.saturating_duration_since(self.filled).as_nanos() / each.as_nanos();
        if due >= u128::from(RATE) {
            *self = Self::new(now);
        } else {
            let due = due as u32; // below RATE
            self.tokens = (self.tokens + due).min(RATE);
            self.filled += each * due;
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_at_once_then_a_hundred_per_second_and_never_saved_up() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let taken = |bucket: &mut Bucket, now| (0..1000).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 100);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(55)), 5);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(59)), 0);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(60)), 1);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(3600)), 100);
    }
}
