use std::sync::{Mutex, mpsc};

use super::*;

/// Takes nothing until the sender sends or is gone.
struct Stuck(mpsc::Receiver<()>, Disk);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk with room for so many bytes, as a reader sees it.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<(usize, Vec<u8>)>>);

impl Disk {
    fn make_room(&self, bytes: usize) {
        self.0.lock().unwrap().0 += bytes;
    }

    fn fill(&self, left: usize) {
        self.0.lock().unwrap().0 = left;
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().1.clone()).unwrap()
    }
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut disk = self.0.lock().unwrap();
        let room = bytes.len().min(disk.0);
        if room == 0 {
            return Err(ErrorKind::StorageFull.into());
        }
        disk.0 -= room;
        disk.1.extend_from_slice(&bytes[..room]);
        Ok(room)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines to this output, how many were dropped, and what was said when it went on.
fn started(writer: impl Write + Send + 'static) -> (Arc<Lines>, Arc<AtomicU64>, mpsc::Receiver<u64>) {
    let dropped = Arc::new(AtomicU64::new(0));
    let counter = dropped.clone();
    let (resumed, totals) = channel();
    let lines = Lines::start(
        "lines",
        Output::new(writer, PIPE_BYTES, false),
        move || {
            counter.fetch_add(1, Ordering::Relaxed);
        },
        move |total| resumed.send(total).unwrap(),
    );
    (Arc::new(lines.unwrap()), dropped, totals)
}

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

#[test]
fn a_stuck_output_costs_lines_which_are_counted_and_blocks_nobody() {
    let (release, stuck) = channel();
    let disk = Disk::default();
    disk.make_room(1 << 20);
    let (lines, dropped, totals) = started(Stuck(stuck, disk.clone()));
    let pushed = 3 * QUEUE_LINES as u64;
    for number in 0..pushed {
        lines.push(format!("{number}\n").into_bytes());
    }
    lines.flush(SHORT);
    assert_eq!(disk.text(), "", "neither the lines nor the flush wait for it");
    assert!(totals.try_recv().is_err());
    let lost = dropped.load(Ordering::Relaxed);
    assert!(lost > QUEUE_LINES as u64 && lost < pushed, "{lost}");
    drop(release);
    assert_eq!(totals.recv_timeout(LONG), Ok(lost), "it is said once it goes on");
    lines.flush(LONG);
    assert_eq!(disk.text().lines().count() as u64, pushed - lost);
}

#[test]
fn a_full_disk_costs_lines_and_leaves_no_half_line_glued_to_the_next() {
    let disk = Disk::default();
    let (lines, dropped, totals) = started(disk.clone());
    let write = |line: &str| {
        lines.push(format!("{line}\n").into_bytes());
        lines.flush(LONG);
    };
    disk.make_room(1 << 20);
    write("first");
    disk.fill(3);
    write("second");
    write("third");
    assert!(totals.try_recv().is_err(), "it does not go on yet");
    // Room for the end of the half line, and no more.
    disk.make_room(1);
    write("fourth");
    disk.make_room(1 << 20);
    write("fifth");
    write("sixth");
    assert_eq!(disk.text(), "first\nsec\nfifth\nsixth\n");
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
    assert_eq!(totals.recv_timeout(LONG), Ok(3));
}

#[test]
fn a_batch_for_a_pipe_is_one_write_of_whole_lines() {
    struct Writes(Sender<Vec<u8>>);
    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (sender, writes) = channel();
    let (lines, ..) = started(Writes(sender));
    let line = [&[b'x'; 99][..], b"\n"].concat();
    (0..1000).for_each(|_| lines.push(line.clone()));
    lines.flush(LONG);
    for write in writes.try_iter() {
        assert!(write.len() <= PIPE_BYTES && write.len() % line.len() == 0, "{}", write.len());
    }
}

#[test]
fn lines_are_written_when_a_program_ends() {
    let disk = Disk::default();
    disk.make_room(1 << 20);
    let (lines, ..) = started(disk.clone());
    lines.push(b"last\n".to_vec());
    drop(FlushOnDrop(lines));
    assert_eq!(disk.text(), "last\n");
}
