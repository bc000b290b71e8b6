//! What a mesh lives through: instances that die, a drain, certificates that end, bodies that stall, apps that close
//! their connections. Real programs in pods; load comes from h2load, odd behaviour from `life/app.py`.

#[path = "life/balance.rs"]
mod balance;
#[path = "life/command.rs"]
mod command;
#[path = "life/drain.rs"]
mod drain;
#[path = "life/frozen.rs"]
mod frozen;
#[path = "life/kill.rs"]
mod kill;
#[path = "life/log.rs"]
mod log;
#[path = "life/renewal.rs"]
mod renewal;
#[path = "life/retry.rs"]
mod retry;
#[path = "life/signals.rs"]
mod signals;
#[path = "life/stall.rs"]
mod stall;
#[path = "life/trace.rs"]
mod trace;
#[path = "life/tunnels.rs"]
mod tunnels;
#[path = "life/world.rs"]
mod world;
