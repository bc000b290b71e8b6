//! The load generators and apps of `tests/bench/run` that no common program offers: requests at a fixed rate with
//! latency counted from the moment they were due, new connections, idle connections, gRPC, bytes, bodies that stall.
//! Each generator prints one JSON object; `hold` and `stall` print a line and stay until they are stopped.

mod bodies;
mod grpc;
mod requests;
mod serve;
mod tally;

use std::process::ExitCode;

const USAGE: &str = "\
bench-peer serve GRPC BYTES BODIES TRACES          the apps, on four addresses
bench-peer rate URL CONNECTIONS RATE SECONDS       HTTP/1 at a fixed rate
bench-peer connect URL CONCURRENCY SECONDS         a new connection for each request; tcp://HOST:PORT for bytes
bench-peer visit FILE TIMES                        so many requests to each URL of a file
bench-peer hold URL COUNT                          idle HTTP/1 connections, after a request each
bench-peer grpc URL unary|stream CONNECTIONS STREAMS SECONDS
bench-peer bytes HOST:PORT down|up CONNECTIONS SECONDS
bench-peer body URL down|up BYTES CONNECTIONS SECONDS
bench-peer stall DOWN-URL UP-URL COUNT             that many downloads and uploads that nobody reads";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match tokio::task::LocalSet::new().run_until(run(&words)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-peer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(words: &[&str]) -> anyhow::Result<()> {
    match words {
        ["serve", grpc, bytes, bodies, traces] => serve::all(grpc, bytes, bodies, traces).await,
        ["rate", url, connections, rate, seconds] => {
            requests::at_rate(url, connections.parse()?, rate.parse()?, seconds.parse()?).await
        }
        ["connect", url, concurrency, seconds] => {
            requests::connecting(url, concurrency.parse()?, seconds.parse()?).await
        }
        ["visit", file, times] => requests::visit(file, times.parse()?).await,
        ["hold", url, count] => requests::hold(url, count.parse()?).await,
        ["grpc", url, kind, connections, streams, seconds] => {
            let kind = kind.parse()?;
            grpc::call(url, kind, connections.parse()?, streams.parse()?, seconds.parse()?).await
        }
        ["bytes", address, way, connections, seconds] => {
            bodies::bytes(address, way.parse()?, connections.parse()?, seconds.parse()?).await
        }
        ["body", url, way, size, connections, seconds] => {
            bodies::bodies(url, way.parse()?, size.parse()?, connections.parse()?, seconds.parse()?).await
        }
        ["stall", down, up, count] => bodies::stall(down, up, count.parse()?).await,
        _ => anyhow::bail!("{USAGE}"),
    }
}
