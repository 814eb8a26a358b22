//! Serves a Llama, Mistral, Qwen2 or Qwen3 with a quantised base and many LoRA
//! adapters over HTTP, each request with the adapter that it names, all in one
//! batch. `docs/serving.md` tells what it promises and how fast it is.
//!
//! ```console
//! $ cargo run --release -- --model Qwen3-0.6B --adapters adapters
//! $ curl localhost:8080/v1/completions -d '{"model": "poet", "prompt": "Once", "max_tokens": 32}'
//! $ curl -X PUT localhost:8080/v1/adapters/poet -d '{"path": "poet-2"}'
//! ```

mod adapters;
mod args;
mod bench;
mod body;
mod engine;
mod files;
mod http;
mod metrics;
mod queue;
mod refusal;
mod row;
mod sample;
mod server;
mod shared;
mod text;

#[path = "../../llama/mod.rs"]
mod llama;
#[path = "../../training/options.rs"]
mod options;

use args::Settings;
use llama::Result;
use server::Server;
use std::process::ExitCode;
use tokio::sync::mpsc;

fn main() -> ExitCode {
    let outcome = match args::parse(std::env::args_os().skip(1)) {
        Ok(Some((settings, None))) => serve(&settings),
        Ok(Some((settings, Some(load)))) => bench::run(&settings, &load),
        Ok(None) => {
            println!("{}", args::HELP);
            Ok(())
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serve: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Until Ctrl-C or SIGTERM; a second one doesn't wait for what was begun.
fn serve(settings: &Settings) -> Result<()> {
    let server = Server::start(settings)?;
    for (name, milliseconds) in &server.loaded {
        eprintln!("{name} loaded in {milliseconds:.1} ms");
    }
    server.runtime.block_on(async {
        let mut signals = signals()?;
        println!("listening on http://{}", server.address);
        signals.recv().await;
        eprintln!("finishing what was begun");
        tokio::spawn(async move {
            signals.recv().await;
            std::process::exit(130);
        });
        Ok::<_, std::io::Error>(())
    })?;
    server.stop()
}

/// Something for each signal that asks the program to end, from now on.
fn signals() -> std::io::Result<mpsc::Receiver<()>> {
    let (send, receive) = mpsc::channel(1);
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            let (mut signal, send) = (signal(kind)?, send.clone());
            tokio::spawn(async move { while signal.recv().await.is_some() && send.send(()).await.is_ok() {} });
        }
    }
    #[cfg(not(unix))]
    tokio::spawn(async move { while tokio::signal::ctrl_c().await.is_ok() && send.send(()).await.is_ok() {} });
    Ok(receive)
}
