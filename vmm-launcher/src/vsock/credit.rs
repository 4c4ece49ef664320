//! Who may send how much on one connection (virtio 1.2 §5.10.6.3): each side announces the size of its receive buffer
//! and, in every packet, how many bytes its application has taken out of it. All counters are modulo 2³².

use std::num::Wrapping;

use super::RECEIVE_WINDOW;

/// Freed bytes that are worth a packet of their own to tell the guest about.
const UPDATE_STEP: u32 = RECEIVE_WINDOW / 2;

/// Guest → host: what the guest was told that it may send.
#[derive(Debug, Default)]
pub struct ReceiveCredit {
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded`, as the guest last heard it; never more than [`RECEIVE_WINDOW`] behind `received`.
    advertised: Wrapping<u32>,
}

impl ReceiveCredit {
    /// Takes `count` bytes in, or says that the guest had no credit for them.
    #[must_use]
    pub fn receive(&mut self, count: usize) -> bool {
        let free = RECEIVE_WINDOW - (self.received - self.advertised).0;
        match u32::try_from(count) {
            Ok(count) if count <= free => self.received += count,
            _ => return false,
        }
        true
    }

    /// The host program has `count` more bytes; it cannot have more than were received.
    pub fn forward(&mut self, count: usize) {
        self.forwarded += count as u32;
    }

    /// Nobody will read what has been received.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Whether the guest should hear of its credit soon.
    pub fn is_update_due(&self) -> bool {
        (self.forwarded - self.advertised).0 >= UPDATE_STEP
    }

    /// The count for a packet that goes to the guest now.
    pub fn advertise(&mut self) -> u32 {
        self.advertised = self.forwarded;
        self.forwarded.0
    }
}

/// Host → guest: what the guest says that it can take.
#[derive(Debug, Default)]
pub struct SendCredit {
    sent: Wrapping<u32>,
    window: u32,
    forwarded: Wrapping<u32>,
    /// The guest was asked for more, and has not given any.
    requested: bool,
}

impl SendCredit {
    /// Takes note of what a packet from the guest says.
    pub fn update(&mut self, window: u32, forwarded: u32) {
        self.window = window;
        self.forwarded = Wrapping(forwarded);
        self.requested &= self.available() == 0;
    }

    /// Bytes that the guest has room for; none if it claims to have forwarded more than was sent.
    pub fn available(&self) -> u32 {
        self.window.saturating_sub((self.sent - self.forwarded).0)
    }

    /// Whether there is something to say: bytes, or a request for credit that was not made yet.
    pub fn is_usable(&self) -> bool {
        self.available() > 0 || !self.requested
    }

    /// The guest is being asked for credit.
    pub fn request(&mut self) {
        self.requested = true;
    }

    /// `count` bytes went out.
    pub fn send(&mut self, count: u32) {
        self.sent += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_wrap_around_keep_their_differences() {
        let mut credit = SendCredit { sent: Wrapping(u32::MAX - 10), ..SendCredit::default() };
        credit.update(100, u32::MAX - 10);
        credit.send(30);
        assert_eq!(credit.available(), 70);
        credit.update(100, 19);
        assert_eq!(credit.available(), 100);
    }

    #[test]
    fn window_that_shrinks_below_what_is_under_way_gives_no_credit() {
        let mut credit = SendCredit::default();
        credit.update(100, 0);
        credit.send(80);
        credit.update(50, 10);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn guest_may_fill_the_window_again_once_it_was_told_that_it_is_empty() {
        let mut credit = ReceiveCredit::default();
        assert!(credit.receive(RECEIVE_WINDOW as usize));
        credit.forward(RECEIVE_WINDOW as usize);
        assert!(!credit.receive(1));
        assert_eq!(credit.advertise(), RECEIVE_WINDOW);
        assert!(credit.receive(RECEIVE_WINDOW as usize));
    }
}
