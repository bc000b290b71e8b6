//! What needs `unsafe` for a command in namespaces of its own: taking over descriptors that came by number or
//! over a socket, keeping one across an exec, and fork (user_namespaces(7), unix(7)). Each block says why it is
//! sound. Decides nothing: the order of things is in `helper.rs` and `exec.rs`.
#![allow(unsafe_code)]

use std::{
    convert::Infallible,
    ffi::{CString, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStringExt, process::CommandExt},
    },
    path::Path,
    process::{Child, Command},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    libc,
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::{ForkResult, Pid, execvpe, fork, getpid, getppid, pipe2},
};

use super::{
    NAMESPACE_ARGUMENT,
    message::{LONGEST, MOST_SOCKETS, Received, Step},
};

/// Starts this program again as the helper, with one end of a new socket; gives the other end.
///
/// # Errors
/// What the kernel says.
pub(super) fn spawn_helper(
    program: &Path,
    command: &[OsString],
    hidden: impl Iterator<Item = OsString>,
) -> io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let mut helper = Command::new(program);
    helper.arg0("weft-sidecar").arg(NAMESPACE_ARGUMENT).arg(theirs.as_raw_fd().to_string()).arg("--");
    helper.args(command);
    for name in hidden {
        helper.env_remove(name);
    }
    let number = theirs.as_raw_fd();
    // SAFETY: between fork and exec it calls only fcntl, which is async-signal-safe, on a descriptor that is
    // open as `theirs` lives until after the spawn.
    unsafe {
        helper.pre_exec(move || {
            fcntl(BorrowedFd::borrow_raw(number), FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        });
    }
    let child = helper.spawn()?;
    Ok((child, ours))
}

/// Takes over the socket whose number stands on the helper's command line.
///
/// # Errors
/// If no such descriptor is open.
pub(super) fn take_over(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(Errno::EBADF.into());
    }
    // SAFETY: borrowed for one call; a number that is not open gives EBADF.
    fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, as fcntl just showed, and at the start of the program nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Waits for the next message; nothing if the other end is gone. Sockets that were attached and for which there was
/// no descriptor left (`MSG_CTRUNC`) are closed by the kernel; the others are given.
///
/// # Errors
/// What `recvmsg` says; `InvalidData` if the text of a message was cut.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Received>> {
    let mut text = vec![0_u8; LONGEST];
    // Of words, for the kernel writes headers of such alignment.
    let mut control = [0_usize; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
    // SAFETY: a plain struct of numbers and pointers, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of_val(&control) as _;
    let length = loop {
        // SAFETY: every pointer in the header is to a buffer that lives here, with its length beside it. Not
        // nix's function: it gives no descriptor at all where some did not fit.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        match Errno::result(received) {
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Ok(None),
            other => break other? as usize,
        }
    };
    let attached = attached_to(&header);
    if header.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of the namespace was cut"));
    }
    text.truncate(length);
    Ok((length > 0).then_some(Received { text, attached }))
}

/// Room for a message's sockets, in words.
const CONTROL_WORDS: usize = (mem::size_of::<libc::cmsghdr>() + MOST_SOCKETS * mem::size_of::<RawFd>())
    .div_ceil(mem::size_of::<usize>())
    + 1;

/// The descriptors that came with a message that `recvmsg` has just filled in (cmsg(3)).
fn attached_to(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut attached = Vec::new();
    // SAFETY: the kernel has filled in the header and its buffer, which both live; these walk inside of it.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: as above; it is null at the end.
    while let Some(about) = unsafe { message.as_ref() } {
        if (about.cmsg_level, about.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: computes a number.
            let head = u64::from(unsafe { libc::CMSG_LEN(0) });
            // Of another type in another C library.
            let count = (about.cmsg_len as u64).saturating_sub(head) as usize / mem::size_of::<RawFd>();
            for at in 0..count {
                // SAFETY: the length says that so many numbers stand there, and the kernel has just opened these
                // descriptors for us: nobody else knows them.
                attached.push(unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(message).cast::<RawFd>().add(at).read_unaligned())
                });
            }
        }
        // SAFETY: as for the first.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    attached
}

/// How the users of a new user namespace are mapped to those of its parent (user_namespaces(7)).
#[derive(Debug, Clone)]
pub(super) struct UserMap {
    pub uids: String,
    pub gids: String,
    /// The kernel wants `setgroups` denied before one without capabilities may map a group.
    pub deny_setgroups: bool,
}

impl UserMap {
    /// Writes it for a process that has just made its user namespace.
    ///
    /// # Errors
    /// What the kernel says; `EPERM` if we may not.
    pub(super) fn write(&self, process: Pid) -> io::Result<()> {
        let folder = Path::new("/proc").join(process.to_string());
        if self.deny_setgroups {
            fs::write(folder.join("setgroups"), "deny")?;
        }
        fs::write(folder.join("uid_map"), &self.uids)?;
        fs::write(folder.join("gid_map"), &self.gids)
    }
}

/// What the kernel said to the execution of the command, or to a step before it.
#[derive(Debug)]
pub(super) struct StartFailed {
    /// None: its execution.
    pub step: Option<Step>,
    pub error: io::Error,
}

impl StartFailed {
    /// It did not come to the execution.
    pub(super) fn before<E: Into<io::Error>>(step: Step) -> impl Fn(E) -> StartFailed {
        move |error| StartFailed { step: Some(step), error: error.into() }
    }
}

/// Starts the command in a user namespace below the helper's, where it has no capability over the helper's
/// network namespace. It dies with the helper. It inherits only descriptors 0, 1 and 2, no blocked signal, and
/// the given environment and soft limit of descriptors.
///
/// # Errors
/// What fork, unshare or exec says, and which of them; then no process is left.
pub(super) fn start_command(
    command: &[CString],
    environment: &[CString],
    users: &UserMap,
    descriptors: Option<u64>,
) -> Result<Pid, StartFailed> {
    let (from_child, to_helper) = pipe2(OFlag::O_CLOEXEC).map_err(StartFailed::before(Step::Command))?;
    let (from_helper, to_child) = pipe2(OFlag::O_CLOEXEC).map_err(StartFailed::before(Step::Command))?;
    let helper = getpid();
    // SAFETY: the helper has one thread, so the child may do whatever a process may.
    match unsafe { fork() }.map_err(StartFailed::before(Step::Command))? {
        ForkResult::Child => {
            drop((from_child, to_child));
            let mut report = File::from(to_helper);
            let prepared = prepare_command(helper, descriptors, &mut report, File::from(from_helper));
            let (stage, error) = match prepared {
                Err(error) => (NOT_PREPARED, error),
                Ok(()) => {
                    let Err(error) = execute(command, environment);
                    (NOT_EXECUTED, error)
                }
            };
            let _ = report.write_all(stage).and_then(|()| report.write_all(&(error as i32).to_ne_bytes()));
            // SAFETY: ends the child at once, without running what the helper has registered for its exit.
            unsafe { libc::_exit(127) }
        }
        ForkResult::Parent { child } => {
            drop((to_helper, from_helper));
            let started = release(child, File::from(from_child), File::from(to_child), users);
            if started.is_err() {
                let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
                let _ = nix::sys::wait::waitpid(child, None);
            }
            started.map(|()| child)
        }
    }
}

/// The helper's side of starting the command: map its users, let it go on, and hear whether exec worked.
fn release(child: Pid, mut report: File, mut go: File, users: &UserMap) -> Result<(), StartFailed> {
    let mut ready = [0];
    report.read_exact(&mut ready).map_err(StartFailed::before(Step::Command))?;
    let is_unshared = ready == *UNSHARED;
    if is_unshared {
        users.write(child).map_err(StartFailed::before(Step::Users))?;
        go.write_all(b"g").map_err(StartFailed::before(Step::Command))?;
    }
    let mut failed = Vec::new();
    report.read_to_end(&mut failed).map_err(StartFailed::before(Step::Command))?;
    // exec closes the pipe; bytes are how far it came and an error number
    let Ok([stage, number @ ..]) = <[u8; 5]>::try_from(failed.as_slice()) else { return Ok(()) };
    let step = match is_unshared {
        false => Some(Step::CommandNamespace),
        true => (stage != NOT_EXECUTED[0]).then_some(Step::Command),
    };
    Err(StartFailed { step, error: io::Error::from_raw_os_error(i32::from_ne_bytes(number)) })
}

const UNSHARED: &[u8; 1] = b"u";
const NOT_UNSHARED: &[u8; 1] = b"n";
const NOT_PREPARED: &[u8; 1] = b"p";
const NOT_EXECUTED: &[u8; 1] = b"e";

/// The child's side, up to the execution of the command.
fn prepare_command(
    helper: Pid,
    descriptors: Option<u64>,
    report: &mut File,
    mut go: File,
) -> Result<(), Errno> {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWUSER) {
        let _ = report.write_all(NOT_UNSHARED);
        return Err(error);
    }
    report.write_all(UNSHARED).map_err(|_| Errno::EPIPE)?;
    go.read_exact(&mut [0]).map_err(|_| Errno::EPIPE)?;
    set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != helper {
        return Err(Errno::ESRCH); // it died before the line above
    }
    close_at_exec()?;
    if let Some(soft) = descriptors {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard)?;
    }
    // SAFETY: sets a default, which runs no code of ours. Rust programs ignore SIGPIPE, others expect it.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// It returns only if it fails.
fn execute(command: &[CString], environment: &[CString]) -> Result<Infallible, Errno> {
    let program = command.first().ok_or(Errno::ENOENT)?;
    execvpe(program, command, environment)
}

/// Whatever descriptor the caller of the sidecar left open: none but 0, 1 and 2 reaches the command.
fn close_at_exec() -> Result<(), Errno> {
    let open = fs::read_dir("/proc/self/fd").map_err(|_| Errno::ENOENT)?;
    for entry in open.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        if let Some(number) = number.filter(|number| *number > 2) {
            // SAFETY: borrowed for one call; the number was open a moment ago and nothing else runs here.
            let _ = fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        }
    }
    Ok(())
}

/// Texts as the kernel's exec takes them.
///
/// # Errors
/// `EINVAL` if one contains a zero byte.
pub(super) fn c_strings(texts: impl IntoIterator<Item = OsString>) -> io::Result<Vec<CString>> {
    texts.into_iter().map(|text| CString::new(text.into_vec()).map_err(|_| Errno::EINVAL.into())).collect()
}

/// Borrows all of them.
pub(super) fn borrowed<T: AsFd>(sockets: &[T]) -> Vec<BorrowedFd<'_>> {
    sockets.iter().map(AsFd::as_fd).collect()
}
