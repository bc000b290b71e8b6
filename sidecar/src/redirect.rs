//! How the traffic of an app comes to the sidecar: iptables rules as data (`plan`), applied atomically and
//! proven (`apply`, `verify`), and a command in a user and network namespace of its own (`exec`), where the same
//! redirect needs no root. It carries no byte itself. The rules and their reasons: docs/redirect.md.

mod apply;
mod command;
mod exec;
mod finding;
mod helper;
mod iptables;
mod message;
mod namespace;
mod plan;
mod rules;
mod settings;
mod stock;
mod verify;

pub use apply::{Applied, apply, clean};
pub use command::RedirectCommand;
pub use exec::{Listeners, Namespace, NamespaceSettings, NotStarted, check};
pub use finding::{Finding, Outcome};
pub use helper::namespace_main;
pub use iptables::Backend;
pub use message::is_message;
pub use plan::{Plan, namespace_plan, plan, plan_text};
pub use rules::{Chain, Family, Jump, Rules, Table};
pub use settings::{Network, PortRange, Settings};
pub use verify::verify;

/// The first argument that makes this program the helper inside a namespace instead of the sidecar.
pub const NAMESPACE_ARGUMENT: &str = "__namespace";
