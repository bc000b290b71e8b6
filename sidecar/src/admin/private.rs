//! The private face: snapshots, the log level and the drain, as JSON over HTTP on a Unix socket that only its
//! owner (and root) may open.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use http_body_util::{BodyExt, Limited};
use hyper::{Method, Request, StatusCode, body::Incoming};
use serde::Deserialize;
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{net::UnixListener, sync::watch};

use super::{
    Action, View,
    answer::{Answer, Open, json, only, serve_one},
};
use crate::telemetry::LogLevel;

/// What the private face shows and sets off.
#[derive(Clone)]
pub struct Private {
    /// `GET /{name}`: `config`, `endpoints`, `certificate`, `status`, ...
    pub views: BTreeMap<&'static str, View>,
    /// `GET /log` and `PUT /log`.
    pub log: LogLevel,
    /// `POST /drain`.
    pub drain: Action,
    /// `POST /leave`.
    pub leave: Leave,
}

/// Leaves the registry and stays out of it, while everything else goes on. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Leave {
    asked: watch::Sender<bool>,
    left: watch::Sender<bool>,
}

impl Default for Leave {
    fn default() -> Self {
        Leave { asked: watch::Sender::new(false), left: watch::Sender::new(false) }
    }
}

impl Leave {
    /// Asks for it, and waits until it is done; the second time, and after a drain, it is done already.
    async fn ask(&self) {
        self.asked.send_replace(true);
        let mut left = self.left.subscribe();
        // Its sender is held here: there is no error.
        let _ = left.wait_for(|left| *left).await;
    }

    /// Ends when somebody has asked for it and it is not done yet.
    pub async fn asked(&self) {
        let mut asked = self.asked.subscribe();
        let _ = asked.wait_for(|asked| *asked).await;
        if *self.left.borrow() {
            std::future::pending::<()>().await;
        }
    }

    /// Says that it is done.
    pub fn done(&self) {
        self.left.send_replace(true);
    }
}

/// The body of `PUT /log`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogChange {
    filter: String,
}

/// Connections at a time; for one more the oldest is closed.
const CONNECTIONS: usize = 16;
const BODY_BYTES: usize = 4096;
const BACKLOG: i32 = 16;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on a path, mode 0600. What a dead sidecar left there is replaced; a living one's is not.
pub fn listen_private(path: &Path) -> io::Result<UnixListener> {
    let at_path = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let refusal = "something other than a socket is there; name another path or remove it";
            return Err(at_path(io::Error::new(io::ErrorKind::AlreadyExists, refusal)));
        }
        if UnixStream::connect(path).is_ok() {
            let refusal = "another sidecar listens there; stop it or name another path";
            return Err(at_path(io::Error::new(io::ErrorKind::AddrInUse, refusal)));
        }
        fs::remove_file(path).map_err(at_path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path).map_err(at_path)?).map_err(at_path)?;
    // Nobody can connect before `listen`: there is no moment with a wider mode.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(at_path)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket.into())
}

/// Serves until it is dropped.
pub async fn serve_private(listener: UnixListener, private: Private) {
    let private = Arc::new(private);
    let mut open = Open::up_to(CONNECTIONS);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the private admin face cannot accept; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let private = private.clone();
        open.add(None, |is_asking| async move {
            serve_one(stream, &is_asking, |request| private.answer(request)).await;
        })
        .await;
    }
}

impl Private {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().trim_matches('/').to_owned();
        let method = request.method().clone();
        match (path.as_str(), &method) {
            ("log", &Method::GET) => json(StatusCode::OK, &json!({ "filter": self.log.current() })),
            ("log", &Method::PUT) => self.change_log(request).await,
            ("log", _) => only("GET, PUT", error(StatusCode::METHOD_NOT_ALLOWED, "only GET and PUT")),
            ("drain", &Method::POST) => {
                (self.drain)();
                json(StatusCode::ACCEPTED, &json!({ "draining": true }))
            }
            ("leave", &Method::POST) => {
                self.leave.ask().await;
                json(StatusCode::OK, &json!({ "left": true }))
            }
            ("drain" | "leave", _) => only("POST", error(StatusCode::METHOD_NOT_ALLOWED, "only POST")),
            (name, &Method::GET) => match self.views.get(name) {
                Some(view) => json(StatusCode::OK, &view()),
                None => error(StatusCode::NOT_FOUND, &self.no_such_view(name)),
            },
            _ => only("GET", error(StatusCode::METHOD_NOT_ALLOWED, "only GET")),
        }
    }

    fn no_such_view(&self, name: &str) -> String {
        let names: Vec<_> = self.views.keys().map(|name| format!("/{name}")).collect();
        format!("there is no /{name}; there are {}, /log, /drain and /leave", names.join(", "))
    }

    async fn change_log(&self, request: Request<Incoming>) -> Answer {
        let body = match Limited::new(request.into_body(), BODY_BYTES).collect().await {
            Ok(body) => body.to_bytes(),
            Err(reason) => return error(StatusCode::BAD_REQUEST, &reason.to_string()),
        };
        let change: LogChange = match serde_json::from_slice(&body) {
            Ok(change) => change,
            Err(reason) => {
                let expected = format!("{reason}; expected {{\"filter\": \"debug\"}} or another filter");
                return error(StatusCode::BAD_REQUEST, &expected);
            }
        };
        if let Err(reason) = self.log.set(&change.filter) {
            return error(StatusCode::BAD_REQUEST, &reason.to_string());
        }
        tracing::info!(filter = change.filter, "the log filter was changed");
        json(StatusCode::OK, &json!({ "filter": self.log.current() }))
    }
}

fn error(status: StatusCode, reason: &str) -> Answer {
    json(status, &Value::from_iter([("error", reason)]))
}

#[cfg(test)]
mod tests;
