//! The serial console: a 16550 whose line is the console's socket.

use std::{
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard},
};

use caisson_vmm_launcher::{Error, Result};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use vm_superio::{Serial as Uart, Trigger, serial::SerialEvents};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use crate::{
    bus::BusDevice,
    event_loop::{Handler, Watcher},
};

/// As many ports as a 16550 has.
pub const REGISTERS: u16 = 8;
/// The token of the only descriptor.
const INPUT: u32 = 0;

/// The console's serial port.
pub struct Serial {
    uart: Mutex<Uart<Interrupt, Drained, Line>>,
    input: Arc<Input>,
}

/// What is typed at the console, and whether the device thread waits for it: not while the guest's buffer is full.
struct Input {
    socket: UnixStream,
    watcher: Watcher,
    waits: Mutex<bool>,
}

struct Interrupt(EventFd);

/// The guest has read everything.
struct Drained(Arc<Input>);

/// Where output goes.
struct Line(UnixStream);

impl Serial {
    /// A port that interrupts by `interrupt`, with the console at the other end of `socket`.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(socket: OwnedFd, interrupt: EventFd, watcher: Watcher) -> Result<Self> {
        let make = || {
            let socket = UnixStream::from(socket);
            let line = Line(socket.try_clone()?);
            let input = Arc::new(Input { socket, watcher, waits: Mutex::new(false) });
            input.wait(true)?;
            let uart = Uart::with_events(Interrupt(interrupt), Drained(input.clone()), line);
            Ok(Self { uart: Mutex::new(uart), input })
        };
        make().map_err(Error::host("make the serial console"))
    }

    /// Ends a write that nobody takes, and all that follow.
    pub fn hang_up(&self) {
        let _ = self.input.socket.shutdown(std::net::Shutdown::Both);
    }

    fn uart(&self) -> MutexGuard<'_, Uart<Interrupt, Drained, Line>> {
        self.uart.lock().expect("the serial port does not panic")
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match data {
            [value] => *value = self.uart().read(offset as u8),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [value] = data {
            // It fails when the console is gone, and the guest does not need to know.
            let _ = self.uart().write(offset as u8, *value);
        }
    }
}

impl Handler for Serial {
    fn ready(&self, _: u32, _: EventSet) {
        let mut uart = self.uart();
        let mut typed = [0; 64];
        let room = uart.fifo_capacity().min(typed.len());
        if room == 0 {
            let _ = self.input.wait(false);
            return;
        }
        match recv(self.input.socket.as_raw_fd(), &mut typed[..room], MsgFlags::MSG_DONTWAIT) {
            Ok(count @ 1..) => {
                // There is room, and an interrupt that cannot be raised is raised already.
                let _ = uart.enqueue_raw_bytes(&typed[..count]);
            }
            Err(Errno::EAGAIN) => {}
            // Nobody types any more.
            Ok(0) | Err(_) => {
                let _ = self.input.wait(false);
            }
        }
    }
}

impl Input {
    fn wait(&self, wait: bool) -> io::Result<()> {
        let mut waits = self.waits.lock().expect("nobody panics with it");
        match (*waits, wait) {
            (false, true) => self.watcher.add(self.socket.as_raw_fd(), EventSet::IN, INPUT)?,
            (true, false) => self.watcher.remove(self.socket.as_raw_fd())?,
            (false, false) | (true, true) => {}
        }
        *waits = wait;
        Ok(())
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        let _ = self.0.wait(true);
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::event_loop::{DeviceThread, EventLoop};

    fn port() -> (Arc<Serial>, UnixStream, EventFd, DeviceThread) {
        let (near, far) = UnixStream::pair().unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        let interrupt = EventFd::new(0).unwrap();
        let serial = Serial::new(far.into(), interrupt.try_clone().unwrap(), event_loop.watcher()).unwrap();
        let serial = Arc::new(serial);
        event_loop.push(serial.clone());
        // Interrupt when data comes.
        serial.write(1, &[1]);
        (serial, near, interrupt, event_loop.start(None).unwrap())
    }

    #[test]
    fn what_the_guest_writes_is_on_the_console() {
        let (serial, mut console, _, _thread) = port();
        serial.write(0, b"x");
        let mut heard = [0];
        console.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"x");
    }

    #[test]
    fn more_input_than_the_port_holds_arrives_complete() {
        let (serial, mut console, interrupt, _thread) = port();
        let typed: Vec<u8> = (0..200).collect();
        console.write_all(&typed).unwrap();
        let mut read = Vec::new();
        while read.len() < typed.len() {
            interrupt.read().unwrap();
            let mut status = [0];
            while {
                serial.read(5, &mut status);
                status[0] & 1 == 1
            } {
                let mut byte = [0];
                serial.read(0, &mut byte);
                read.push(byte[0]);
            }
        }
        assert_eq!(read, typed);
    }

    #[test]
    fn a_console_that_is_gone_does_no_harm() {
        let (serial, console, _, _thread) = port();
        drop(console);
        serial.write(0, b"x");
        let mut status = [0];
        serial.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for the next byte");
    }
}
