//! What the sidecar and its helper inside a namespace say to each other: one JSON text per message of a Unix
//! socket (`SOCK_SEQPACKET`), with sockets attached. Both ends are the same program, so there are no versions.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

/// The most sockets in one message: the kernel takes 253 (`SCM_MAX_FD`).
pub(super) const MOST_SOCKETS: usize = 64;
/// The longest message in bytes.
pub(super) const LONGEST: usize = 32 * 1024;

/// From the sidecar to the helper.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToHelper {
    /// The first message.
    Prepare(Preparation),
    /// The users of the new namespace are mapped; `everyone` if all are, and not only one.
    Mapped { everyone: bool },
    /// Start the command.
    Start,
    /// Send this signal to the command.
    Signal(i32),
    /// Make sockets for connections to the app; at most [`MOST_SOCKETS`].
    MakeSockets { ipv6: bool, count: usize },
}

/// What the helper sets up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Preparation {
    pub workers: usize,
    pub outbound_port: u16,
    pub dns_port: u16,
    pub ipv6: bool,
    /// `auto`, `nft` or `legacy`.
    pub backend: String,
    pub upstreams: Vec<SocketAddr>,
    /// Soft limit of open descriptors (`RLIMIT_NOFILE`) that the command gets; none: the helper's own.
    pub command_descriptors: Option<u64>,
}

/// From the helper to the sidecar.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromHelper {
    /// The namespaces are there; now map the users.
    Unshared,
    /// The attached listener.
    Listener(Purpose),
    /// Network, rules and listeners are there.
    Prepared,
    /// That step failed; the helper ends.
    Failed { step: Step, reason: String },
    /// The command runs.
    Started,
    /// The command could not be started: what the kernel said to its execution, or to that step before it.
    NotStarted { step: Option<Step>, errno: i32 },
    /// So many sockets were `made` and attached; `missing` of those that were asked for could not be made.
    Sockets { ipv6: bool, made: usize, missing: usize, errno: i32 },
    /// The command ended: its status as `wait(2)` gives it.
    Exited { status: i32 },
}

/// What a listener is for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Purpose {
    Outbound,
    DnsUdp,
    DnsTcp,
    Upstream(SocketAddr),
}

/// Where the preparation of a namespace, or the start of the command in it, can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Step {
    /// Making a user and a network namespace.
    Unshare,
    /// Mapping the users.
    Users,
    /// Bringing up loopback and its route.
    Network,
    /// Applying the rules.
    Rules,
    /// Opening the listeners.
    Listeners,
    /// Making the user namespace of the command.
    CommandNamespace,
    /// Making the process of the command, up to its execution.
    Command,
}

/// Sends a message, from any thread: one message is one unit.
///
/// # Errors
/// What `sendmsg` says; `EPIPE` if the other end is gone.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    attached: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    if text.len() > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a message to the namespace is too long"));
    }
    let raw: Vec<RawFd> = attached.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let (bytes, flags) = ([IoSlice::new(&text)], MsgFlags::MSG_NOSIGNAL);
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &bytes, control, flags, None) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other.map(drop).map_err(io::Error::from),
        }
    }
}

/// Reads a message that [`super::namespace::receive`] took from the socket.
///
/// # Errors
/// If it is none.
pub(super) fn parse<'a, T: Deserialize<'a>>(received: &'a Received) -> io::Result<T> {
    serde_json::from_slice(&received.text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Is this a message that the sidecar or its helper understands?
pub fn is_message(text: &[u8]) -> bool {
    serde_json::from_slice::<ToHelper>(text).is_ok() || serde_json::from_slice::<FromHelper>(text).is_ok()
}

/// A message as it came. Where the receiver may have no more descriptors, the kernel closes some or all of the
/// sockets that were attached, and the text still arrives.
#[derive(Debug)]
pub(super) struct Received {
    pub text: Vec<u8>,
    pub attached: Vec<OwnedFd>,
}
