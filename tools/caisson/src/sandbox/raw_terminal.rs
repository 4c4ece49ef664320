//! This process's terminal, given over to a program in the guest.

use std::io::{IsTerminal, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Passes every key on as it is; the terminal is as before when this is dropped.
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    /// None when standard input and output are not both a terminal.
    pub(super) fn enter() -> Option<Self> {
        if !is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may have gone by then.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}

/// Whether a person sits at both ends.
pub(super) fn is_terminal() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// Columns and rows; zeros when there is no terminal.
pub(super) fn size() -> (u16, u16) {
    tcgetwinsize(stdout()).map_or((0, 0), |size| (size.ws_col, size.ws_row))
}
