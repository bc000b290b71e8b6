//! How many descriptors this process may open (`RLIMIT_NOFILE`, getrlimit(2)), and how many connections fit. The soft
//! limit is raised to the hard one: it is low for programs that use select(2), which the sidecar does not. The
//! command of `exec` may be such a program and gets the old one back (`redirect`).

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// For everything but connections of the traffic: listeners, DNS, the admin interface, the registry, files.
const RESERVE: u64 = 256;
/// A connection in each direction, and each with another one behind it.
const PER_CONNECTION: u64 = 4;

/// What was found and what holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptors {
    /// The soft limit that this process was started with.
    pub(super) before: u64,
    /// The soft limit now.
    pub(super) now: u64,
}

impl Descriptors {
    /// Raises the soft limit of this process to the hard one.
    pub(super) fn raise() -> nix::Result<Descriptors> {
        let (before, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        if let Err(error) = raised {
            tracing::warn!(
                "the limit of open files (RLIMIT_NOFILE) stays at {before} and is not raised to {hard}: {error}"
            );
        }
        Ok(Descriptors { before, now: if raised.is_ok() { hard } else { before } })
    }

    /// How many connections of those wanted fit in each direction, so that each may have another one behind it.
    pub(super) fn connections(self, wanted: usize) -> usize {
        let reserve = RESERVE.min(self.now / 2);
        let fit = usize::try_from((self.now - reserve) / PER_CONNECTION).unwrap_or(usize::MAX);
        wanted.min(fit.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_connections_fit() {
        for (now, wanted, expected) in [
            (u64::MAX, 20_000, 20_000),
            (1_048_576, 20_000, 20_000),
            (80_256, 20_000, 20_000),
            (80_255, 20_000, 19_999),
            (4096, 20_000, 960),
            (4096, 100, 100),
            (1024, 20_000, 192),
            (256, 20_000, 32),
            (3, 20_000, 1),
            (0, 20_000, 1),
        ] {
            assert_eq!(Descriptors { before: 0, now }.connections(wanted), expected, "{now} {wanted}");
        }
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let raised = Descriptors::raise().unwrap();
        assert_eq!(raised.now, hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        assert_eq!(Descriptors::raise().unwrap(), Descriptors { before: hard, now: hard });
    }
}
