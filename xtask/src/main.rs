//! The chores of tch-peft: `cargo xtask setup | demo | test | bench | doc`.
//!
//! Each command first makes sure that what it needs is there (a libtorch, and
//! for tests and benches the Python peers) and then runs cargo. What is there
//! already is kept, so a second call costs a fraction of a second.

mod bundle;
mod cargo;
mod cli;
mod libtorch;
mod python;
mod tools;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cargo::{Cargo, TestCount};
use cli::{Command, HELP};
use libtorch::Libtorch;
use python::{Requirements, Venv};

/// What went wrong: the text for the user and the status to exit with.
#[derive(Debug)]
struct Failure {
    message: String,
    status: u8,
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self { message, status: 1 }
    }
}

type Result<T, E = Failure> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match cli::parse(&args).map_err(Failure::from).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

fn run(command: Command) -> Result<()> {
    let root = root();
    match command {
        Command::Help => {
            print!("{HELP}");
            Ok(())
        }
        Command::Setup { peers } => {
            setup(&root, peers)?;
            println!("Ready: `cargo test` and `cargo run --example demo` work as they are.");
            Ok(())
        }
        Command::Demo { args } => {
            let ready = setup(&root, false)?;
            ready.cargo(["run", "--release", "--example", "demo", "--"]).args(args).run()
        }
        Command::Test { peers, args } => test(&setup(&root, peers)?, args),
        Command::Bundle(bundle) => bundle.make(&setup(&root, bundle.stand_in.is_some())?),
        Command::Bench { args } => setup(&root, true)?.cargo(["bench"]).args(args).run(),
        Command::Doc { args } => doc(&setup(&root, false)?, []).args(args).run(),
    }
}

/// The repository's root. Cargo says at run time where this package is; the
/// place it was built from serves when the binary is started by hand.
fn root() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or(package.clone(), Path::to_path_buf)
}

/// What `setup` found or made, and so how cargo has to be started.
struct Ready {
    root: PathBuf,
    libtorch: Libtorch,
    peers: Option<Venv>,
}

impl Ready {
    /// A cargo command with the environment that this set-up asks for.
    fn cargo<const N: usize>(&self, args: [&str; N]) -> Cargo {
        let python = self.peers.as_ref().map(Venv::python);
        Cargo::new(&self.root, &self.libtorch, python.as_deref()).args(args)
    }
}

/// Provides the libtorch and, with `peers`, the Python libraries to compare with.
fn setup(root: &Path, peers: bool) -> Result<Ready> {
    let libtorch = Libtorch::find(root)?;
    if let Libtorch::Own { path, origin } = &libtorch {
        println!("Keeping your own libtorch: {} ({origin}).", path.display());
    }

    let wanted = match (&libtorch, peers) {
        (_, true) => Some(Requirements::with_peers(root)?),
        (Libtorch::Venv, false) => Some(Requirements::base(root)?),
        (Libtorch::Own { .. }, false) => None,
    };
    let venv = Venv::at(root);
    let missing = wanted.filter(|wanted| !venv.has(wanted));
    let python = tools::check(missing.is_some())?;
    if let (Some(missing), Some(python)) = (missing, python) {
        venv.install(&python, &missing)?;
    }
    if let Libtorch::Venv = libtorch {
        libtorch::link(root, &venv.torch_dir()?)?;
    }
    Ok(Ready { root: root.to_path_buf(), libtorch, peers: peers.then_some(venv) })
}

/// `cargo doc` for our own packages, warnings being errors.
fn doc<const N: usize>(ready: &Ready, args: [&str; N]) -> Cargo {
    ready.cargo(["doc", "--no-deps"]).args(args).env("RUSTDOCFLAGS", "-D warnings")
}

/// The example that is a crate of its own, and builds into the same folder.
const SERVE: [&str; 2] = ["--manifest-path", "examples/serve/Cargo.toml"];
const SHARED: [&str; 2] = ["--target-dir", "target"];

/// Format, lints, documentation and tests, stopping at the first that fails.
fn test(ready: &Ready, args: Vec<OsString>) -> Result<()> {
    tools::check_components(|command| ready.cargo([command, "--version"]).succeeds_quietly())?;
    if ready.peers.is_none() {
        println!("Without the Python peers: tests that compare with them check nothing.");
    }
    let fmt = |cargo: Cargo| cargo.args(["--all", "--check"]);
    let clippy = |cargo: Cargo| cargo.args(["--all-targets", "--", "-D", "warnings"]);
    let test = |cargo: Cargo| match ready.peers {
        Some(_) => cargo,
        None => cargo.env(cargo::PEER_PYTHON, ""),
    };
    let workspace = |command| ready.cargo([command, "--workspace"]);
    let serve = |command| ready.cargo([command]).args(SERVE).args(SHARED);
    let checks = [
        ("format", fmt(ready.cargo(["fmt"]))),
        ("format", fmt(ready.cargo(["fmt"]).args(SERVE))),
        ("lints", clippy(workspace("clippy"))),
        ("lints", clippy(serve("clippy"))),
        ("docs", doc(ready, ["--workspace"])),
    ];
    // Arguments name tests of the library.
    let of_serve = args.is_empty().then(|| test(serve("test")));
    let tests = std::iter::once(test(workspace("test")).args(args)).chain(of_serve);
    let steps: Vec<_> = checks.into_iter().chain(tests.map(|step| ("tests", step))).collect();

    let (mut times, mut count): (Vec<(&str, Duration)>, _) = (Vec::new(), TestCount::default());
    let all = steps.len();
    for (n, (name, step)) in steps.into_iter().enumerate() {
        let start = Instant::now();
        println!("\n==> {}/{all} {name}: {}", n + 1, step.display());
        match name {
            "tests" => count.add(step.run_counting_tests()?),
            _ => step.run()?,
        }
        times.push((name, start.elapsed()));
    }

    println!();
    for (name, time) in times {
        println!("{name:<7} ok {:>7.1} s", time.as_secs_f64());
    }
    match ready.peers {
        Some(_) => println!("peers   on (versions: python/requirements-*.txt)"),
        None => println!("peers   OFF (--no-peers): nothing was compared with them"),
    }
    println!("{count}");
    Ok(())
}
