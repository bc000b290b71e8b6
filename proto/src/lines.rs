//! Lines of a log, for an output that may be slow, full, closed, or stuck (a pipe that nobody reads). They go through
//! a bounded queue to a thread of their own, so that writing a line never blocks and never fails. A line that finds the
//! queue full, or that the output does not take, is dropped and counted. All logs of all programs are written so, except
//! the audit of the authority, which must not lose a line.

use std::{
    fmt::{self, Display},
    fs::File,
    io::{self, ErrorKind, Write},
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, SyncSender, TryRecvError, TrySendError, channel, sync_channel},
    },
    thread,
    time::Duration,
};

/// The side that writes lines. The last one to be dropped ends the thread.
#[derive(Debug)]
pub struct Lines {
    queue: SyncSender<Message>,
    dropped: Arc<Dropped>,
}

/// Where lines go.
pub struct Output {
    writer: Box<dyn Write + Send>,
    /// Bytes that are gathered before they are written, while lines go on coming.
    batch: usize,
    /// It ends in half a line, which the next one must not continue.
    is_torn: bool,
}

/// Waits for the lines so far when it is dropped, though not for longer than [`LAST_LINES`]: for the end of a program,
/// by a panic too.
#[must_use]
#[derive(Debug)]
pub struct FlushOnDrop(pub Arc<Lines>);

#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    /// Write what you have, then answer.
    Flush(Sender<()>),
}

/// Lines that were lost since the start.
struct Dropped {
    total: AtomicU64,
    on_dropped: Box<dyn Fn() + Send + Sync>,
}

/// Lines that may wait for the thread.
const QUEUE_LINES: usize = 4096;
/// What one write puts into a pipe in one piece (Linux, pipe(7), PIPE_BUF): no line of somebody else gets between.
const PIPE_BYTES: usize = 4096;
/// The longest wait for a stuck output at the end of a program.
pub const LAST_LINES: Duration = Duration::from_secs(1);

impl Output {
    /// An output that takes batches of this size. `is_torn`: it ends in half a line already.
    pub fn new(writer: impl Write + Send + 'static, batch: usize, is_torn: bool) -> Output {
        Output { writer: Box::new(writer), batch, is_torn }
    }

    /// A copy of the standard output or standard error of this process. Not through the standard library's own: it keeps
    /// the rest of a line that failed, and whoever waits for its lock waits for a stuck pipe.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn stream(stream: impl AsFd) -> io::Result<Output> {
        let copy = BorrowedFd::try_clone_to_owned(&stream.as_fd())?;
        Ok(Output::new(File::from(copy), PIPE_BYTES, false))
    }
}

impl Lines {
    /// Starts the thread. `on_dropped` is called for each line that is lost; `on_resumed` with the number of all lines lost
    /// since the start, once lines are written again. It may write a line itself.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        thread_name: &str,
        output: Output,
        on_dropped: impl Fn() + Send + Sync + 'static,
        on_resumed: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Lines> {
        let (queue, receiver) = sync_channel(QUEUE_LINES);
        let dropped = Arc::new(Dropped { total: AtomicU64::new(0), on_dropped: Box::new(on_dropped) });
        let writer = Writer { output, waiting: Vec::new(), is_working: true, dropped: dropped.clone() };
        thread::Builder::new()
            .name(thread_name.to_owned())
            .spawn(move || write_lines(&receiver, writer, on_resumed))?;
        Ok(Lines { queue, dropped })
    }

    /// Queues a line, which ends in a line feed.
    pub fn push(&self, line: Vec<u8>) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.dropped.add(1);
        }
    }

    /// Blocks until the lines so far are written, but not longer than this.
    pub fn flush(&self, longest: Duration) {
        let (done, written) = channel();
        if let Err(TrySendError::Full(message)) = self.queue.try_send(Message::Flush(done)) {
            let queue = self.queue.clone();
            let waiting = move || queue.send(message);
            // The wait for a place in the queue has no bound; ours has.
            let _ = thread::Builder::new().name("weft-log-flush".to_owned()).spawn(waiting);
        }
        let _ = written.recv_timeout(longest);
    }
}

/// For `tracing_subscriber`, which writes each event as one line.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for FlushOnDrop {
    fn drop(&mut self) {
        self.0.flush(LAST_LINES);
    }
}

/// Writes a message to standard error for whoever started the program, which is about to end. Waits for a pipe that is
/// full no longer than [`LAST_LINES`], and does not fail.
pub fn complain(message: impl Display) {
    let started =
        Output::stream(io::stderr()).and_then(|output| Lines::start("weft-complaint", output, || {}, |_| {}));
    if let Ok(lines) = started {
        lines.push(format!("{message}\n").into_bytes());
        lines.flush(LAST_LINES);
    }
}

impl Dropped {
    fn add(&self, lines: usize) {
        for _ in 0..lines {
            self.total.fetch_add(1, Ordering::Relaxed);
            (self.on_dropped)();
        }
    }
}

impl fmt::Debug for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dropped").field(&self.total).finish()
    }
}

/// The thread's side.
struct Writer {
    output: Output,
    waiting: Vec<u8>,
    /// The output took the last batch.
    is_working: bool,
    dropped: Arc<Dropped>,
}

impl Writer {
    fn push(&mut self, line: &[u8]) {
        if self.waiting.len() + line.len() > self.output.batch {
            self.flush();
        }
        self.waiting.extend_from_slice(line);
    }

    fn flush(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let Output { writer, is_torn, .. } = &mut self.output;
        if *is_torn {
            *is_torn = write_all_of(&mut **writer, b"\n") == 0;
        }
        let written = if *is_torn { 0 } else { write_all_of(&mut **writer, &self.waiting) };
        let (taken, left) = self.waiting.split_at(written);
        *is_torn |= taken.last().is_some_and(|last| *last != b'\n');
        self.is_working = left.is_empty();
        self.dropped.add(left.iter().filter(|byte| **byte == b'\n').count());
        self.waiting.clear();
    }
}

/// How many of these bytes the output took before it failed.
fn write_all_of(output: &mut dyn Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match output.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

/// Writes until every sender is gone. An output that fails loses lines, not the thread.
fn write_lines(queue: &Receiver<Message>, mut writer: Writer, on_resumed: impl Fn(u64)) {
    let mut told = 0;
    loop {
        let message = match queue.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                writer.flush();
                let total = writer.dropped.total.load(Ordering::Relaxed);
                if total > told && writer.is_working {
                    told = total;
                    on_resumed(total);
                }
                let Ok(message) = queue.recv() else { break };
                message
            }
        };
        match message {
            Message::Line(line) => writer.push(&line),
            Message::Flush(done) => {
                writer.flush();
                let _ = done.send(());
            }
        }
    }
    writer.flush();
}

#[cfg(test)]
mod tests;
