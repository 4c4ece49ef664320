//! The guest's way out: registers for sleep (that is, power off) and reset, as the ACPI tables describe them.
//!
//! ```text
//!  offset 0: sleep control, ACPI 6.5 §4.8.3.7        offset 1: sleep status, §4.8.3.7
//!  offset 2: reset, §4.8.3.6
//! ```

use crate::{
    bus::BusDevice,
    ending::{End, Ending},
};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// How many registers there are, a byte each.
pub const REGISTERS: u16 = 3;
/// The value that resets.
pub const RESET_VALUE: u8 = 1;
/// The type of sleep that the `_S5` package names.
pub const SLEEP_TYPE_S5: u8 = 5;

/// `SLP_TYPx` and `SLP_EN` of the sleep control register.
const POWER_OFF: u8 = SLEEP_TYPE_S5 << 2 | 1 << 5;
/// "Pulse reset line" to an i8042 keyboard controller.
const PULSE_RESET: u8 = 0xfe;

/// The ACPI registers.
pub struct Power(Ending);

impl Power {
    /// Registers that end what `ending` stands for.
    pub fn new(ending: Ending) -> Self {
        Self(ending)
    }
}

impl BusDevice for Power {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset as u16, data) {
            (SLEEP_CONTROL, [POWER_OFF]) => self.0.tell(End::PoweredOff),
            (RESET, [RESET_VALUE]) => self.0.tell(End::Reset),
            _ => {}
        }
    }
}

/// The command port of a keyboard controller without a keyboard: guests that do not know ACPI reset by it.
pub struct KeyboardReset(Ending);

impl KeyboardReset {
    /// A port that ends what `ending` stands for.
    pub fn new(ending: Ending) -> Self {
        Self(ending)
    }
}

impl BusDevice for KeyboardReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        // Ready for a command: a guest that waits for that gets on.
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            self.0.tell(End::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn end_by(device: fn(Ending) -> Box<dyn BusDevice>, offset: u16, value: u8) -> Option<End> {
        let ending = Ending::default();
        device(ending.clone()).write(offset.into(), &[value]);
        if ending.is_told() { Some(ending.told().await) } else { None }
    }

    #[tokio::test]
    async fn sleep_s5_powers_off() {
        // ACPICA writes the type first and enables it with the second write or at once: SLP_TYP 5, SLP_EN.
        assert_eq!(end_by(|ending| Box::new(Power::new(ending)), SLEEP_CONTROL, 0x34).await, Some(End::PoweredOff));
    }

    #[tokio::test]
    async fn another_sleep_is_no_end() {
        assert_eq!(end_by(|ending| Box::new(Power::new(ending)), SLEEP_CONTROL, 0x20).await, None);
    }

    #[tokio::test]
    async fn the_reset_register_resets() {
        assert_eq!(end_by(|ending| Box::new(Power::new(ending)), RESET, RESET_VALUE).await, Some(End::Reset));
    }

    #[tokio::test]
    async fn a_keyboard_controller_resets() {
        assert_eq!(end_by(|ending| Box::new(KeyboardReset::new(ending)), 0, 0xfe).await, Some(End::Reset));
    }
}
