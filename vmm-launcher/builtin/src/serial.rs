//! The serial console: a 16550 whose line is the console's socket. What the guest writes byte by byte goes there by lines.

use std::{
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use caisson_vmm_launcher::{Error, Result};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send},
};
use vm_superio::{Serial as Uart, Trigger, serial::SerialEvents};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd, timerfd::TimerFd};

use crate::{
    bus::BusDevice,
    event_loop::{Handler, Watcher},
};

/// As many ports as a 16550 has.
pub const REGISTERS: u16 = 8;
/// A line that gets longer goes to the console in pieces.
const LINE_BYTES: usize = 256;
/// When a line goes there that the guest has not ended, such as a prompt.
const PATIENCE: Duration = Duration::from_millis(5);
/// The tokens of the descriptors.
const INPUT: u32 = 0;
const TIMER: u32 = 1;

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
struct Line {
    socket: UnixStream,
    unsent: Vec<u8>,
    timer: TimerFd,
    timer_runs: bool,
}

impl Serial {
    /// A port that interrupts by `interrupt`, with the console at the other end of `socket`.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(socket: OwnedFd, interrupt: EventFd, watcher: Watcher) -> Result<Self> {
        let make = || {
            let socket = UnixStream::from(socket);
            let timer = TimerFd::new()?;
            watcher.add(timer.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, TIMER)?;
            let line = Line { socket: socket.try_clone()?, unsent: Vec::new(), timer, timer_runs: false };
            let input = Arc::new(Input { socket, watcher, waits: Mutex::new(false) });
            input.wait(true)?;
            let uart = Uart::with_events(Interrupt(interrupt), Drained(input.clone()), line);
            Ok(Self { uart: Mutex::new(uart), input })
        };
        make().map_err(Error::host("make the serial console"))
    }

    /// Ends a write that nobody takes, and all that follow.
    pub fn hang_up(&self) {
        self.send_rest();
        let _ = self.input.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Sends what it has of the line that the guest has not ended, if that can be done at once.
    pub fn send_rest(&self) {
        if let Ok(mut uart) = self.uart.try_lock() {
            uart.writer_mut().send_now();
        }
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
    fn ready(&self, token: u32, _: EventSet) {
        let mut uart = self.uart();
        if token == TIMER {
            let line = uart.writer_mut();
            line.timer_runs = false;
            return line.send_now();
        }
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

impl Line {
    /// Does not wait for the console: what it does not take now goes with what the guest writes next.
    fn send_now(&mut self) {
        if self.unsent.is_empty() {
            return;
        }
        match send(self.socket.as_raw_fd(), &self.unsent, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => drop(self.unsent.drain(..count)),
            Err(Errno::EAGAIN) => {}
            Err(_) => self.unsent.clear(),
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unsent.extend(bytes);
        if bytes.ends_with(b"\n") || self.unsent.len() >= LINE_BYTES {
            let sent = self.socket.write_all(&self.unsent);
            self.unsent.clear();
            sent?;
        } else if !self.timer_runs {
            self.timer.reset(PATIENCE, None)?;
            self.timer_runs = true;
        }
        Ok(bytes.len())
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
        (serial, near, interrupt, event_loop.start().unwrap())
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
    fn a_line_goes_to_the_console_at_its_end() {
        let (near, far) = UnixStream::pair().unwrap();
        // Nobody looks at the timer.
        let event_loop = EventLoop::new().unwrap();
        let serial = Serial::new(far.into(), EventFd::new(0).unwrap(), event_loop.watcher()).unwrap();
        near.set_nonblocking(true).unwrap();
        let mut console = &near;
        let mut heard = [0; 2 * LINE_BYTES];
        b"hello".iter().for_each(|byte| serial.write(0, &[*byte]));
        assert_eq!(console.read(&mut heard).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        serial.write(0, b"\n");
        assert_eq!(console.read(&mut heard).unwrap(), 6);
        (0..LINE_BYTES).for_each(|_| serial.write(0, b"x"));
        assert_eq!(console.read(&mut heard).unwrap(), LINE_BYTES);
        serial.write(0, b"$");
        serial.hang_up();
        assert_eq!(console.read(&mut heard).unwrap(), 1);
        assert_eq!(console.read(&mut heard).unwrap(), 0);
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
