//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// What `cargo xtask --help` prints.
pub const HELP: &str = "\
The chores of tch-peft.

Usage: cargo xtask <command> [options]

  setup [--peers]             Python environment under target/ with torch, and
                              libtorch linked where cargo finds it. --peers adds
                              the libraries that tests and benches compare with.
  demo [ARGS...]              Run the demo, in release mode; ARGS go to it.
  test [--no-peers] [-- ARGS] Check the format, lints and docs, then run every
                              test, also of examples/serve; ARGS go to the
                              library's `cargo test`, and those alone are run.
                              --no-peers leaves out what compares with the
                              Python libraries.
  test --device cuda [--out DIR] [--tar]
                              Build the tests and the GPU's bench into a folder,
                              target/bundle unless named, to be carried to a
                              machine with a GPU, a driver and a torch, where
                              `./run` runs them. --tar packs it into one file.
  test --device stand-in [-- ARGS]
                              Build such a folder, and run it here, on the CPU's
                              memory that stands in for a GPU; ARGS go to `./run`.
  bench [ARGS...]             Run the benches; ARGS go to `cargo bench`.
  doc [--open]                Build the documentation; warnings are errors.

Each command does the setup that it needs by itself; what is there is kept.
Arguments after `--` are passed on as they are, so `demo -- --help` shows the
demo's own help.

Environment:
  LIBTORCH   a libtorch of your own; it is used as it is, none is installed
  CXX        the C++ compiler, if it is not `c++`
";

/// A parsed command line.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// `--help`, anywhere before a `--`, or no command at all.
    Help,
    /// `setup [--peers]`
    Setup {
        /// Install the Python peers too.
        peers: bool,
    },
    /// `demo [ARGS...]`
    Demo {
        /// For the example.
        args: Vec<OsString>,
    },
    /// `test [--no-peers] [-- ARGS...]`
    Test {
        /// Compare with the Python peers.
        peers: bool,
        /// For `cargo test`.
        args: Vec<OsString>,
    },
    /// `test --device cuda|stand-in [--out DIR] [--tar] [-- ARGS...]`
    Bundle(Bundle),
    /// `bench [ARGS...]`
    Bench {
        /// For `cargo bench`.
        args: Vec<OsString>,
    },
    /// `doc [--open]`
    Doc {
        /// For `cargo doc`.
        args: Vec<OsString>,
    },
}

/// What `test --device` makes.
#[derive(Debug, PartialEq)]
pub struct Bundle {
    /// The folder, if not `target/bundle`. What an earlier call made there is replaced.
    pub out: Option<PathBuf>,
    /// Pack the folder into a file beside it, too.
    pub tar: bool,
    /// Run it here on the stand-in for a GPU, with these arguments, instead of
    /// leaving it to be carried away.
    pub stand_in: Option<Vec<OsString>>,
}

/// Reads the arguments that follow `cargo xtask`.
pub fn parse(args: &[OsString]) -> Result<Command, String> {
    let Some((command, rest)) = args.split_first() else {
        return Ok(Command::Help);
    };
    let split = rest.iter().position(|arg| arg == "--");
    let (ours, theirs) = match split {
        Some(at) => (&rest[..at], &rest[at + 1..]),
        None => (rest, &rest[rest.len()..]),
    };
    let is_help = |arg: &OsString| arg == "--help" || arg == "-h";
    if is_help(command) || command == "help" || ours.iter().any(is_help) {
        return Ok(Command::Help);
    }
    let command = command.to_string_lossy();
    match &*command {
        "setup" => {
            let peers = flag(ours, "--peers", &command)?;
            none_passed_on(split, &command)?;
            Ok(Command::Setup { peers })
        }
        "demo" => Ok(Command::Demo { args: [ours, theirs].concat() }),
        "test" if ours.iter().any(|arg| arg == "--device") => {
            let bundle = bundle(ours, theirs)?;
            if bundle.stand_in.is_none() {
                none_passed_on(split, "test --device cuda")?;
            }
            Ok(Command::Bundle(bundle))
        }
        "test" => Ok(Command::Test { peers: !flag(ours, "--no-peers", &command)?, args: theirs.to_vec() }),
        "bench" => Ok(Command::Bench { args: rest.to_vec() }),
        "doc" => {
            let open = flag(ours, "--open", &command)?;
            none_passed_on(split, &command)?;
            Ok(Command::Doc { args: open.then(|| "--open".into()).into_iter().collect() })
        }
        _ => Err(format!("no command `{command}`; `cargo xtask --help` lists them")),
    }
}

/// What `test --device` is to make.
fn bundle(args: &[OsString], theirs: &[OsString]) -> Result<Bundle, String> {
    let mut bundle = Bundle { out: None, tar: false, stand_in: None };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("`{}` needs a value", arg.to_string_lossy()));
        match arg.to_str() {
            Some("--device") => match &*value()?.to_string_lossy() {
                "cuda" => bundle.stand_in = None,
                "stand-in" => bundle.stand_in = Some(theirs.to_vec()),
                other => {
                    let usual = "without it, tests run here on the CPU";
                    return Err(format!("--device can be cuda or stand-in, not `{other}`: {usual}"));
                }
            },
            Some("--out") => bundle.out = Some(value()?.into()),
            Some("--tar") => bundle.tar = true,
            _ => {
                let arg = arg.to_string_lossy();
                return Err(format!("`test --device` takes --out DIR and --tar only, not `{arg}`"));
            }
        }
    }
    Ok(bundle)
}

/// Whether the command's only option is given; anything else is an error.
fn flag(args: &[OsString], option: &str, command: &str) -> Result<bool, String> {
    match args.iter().find(|arg| *arg != OsStr::new(option)) {
        Some(other) => {
            Err(format!("`{command}` takes {option} only, not `{}`; see `cargo xtask --help`", other.to_string_lossy()))
        }
        None => Ok(!args.is_empty()),
    }
}

/// Refuses a `--` where there is no program to pass arguments on to.
fn none_passed_on(split: Option<usize>, command: &str) -> Result<(), String> {
    match split {
        Some(_) => Err(format!("`{command}` passes no arguments on")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    fn parsed(args: &[&str]) -> Result<Command, String> {
        parse(&os(args))
    }

    #[test]
    fn help_is_ours_before_the_dashes_and_theirs_after() {
        for args in [&[][..], &["--help"], &["-h"], &["demo", "--help"]] {
            assert_eq!(parsed(args), Ok(Command::Help), "{args:?}");
        }
        let args = os(&["--help"]);
        assert_eq!(parsed(&["demo", "--", "--help"]), Ok(Command::Demo { args }));
    }

    #[test]
    fn demo_takes_arguments_with_or_without_the_dashes() {
        let args = os(&["--steps", "3"]);
        for given in [&["demo", "--steps", "3"][..], &["demo", "--", "--steps", "3"]] {
            let args = args.clone();
            assert_eq!(parsed(given), Ok(Command::Demo { args }));
        }
    }

    #[test]
    fn bench_keeps_the_dashes_for_cargo() {
        let args = os(&["--bench", "nf4", "--", "--quick"]);
        let given = ["bench", "--bench", "nf4", "--", "--quick"];
        assert_eq!(parsed(&given), Ok(Command::Bench { args }));
    }

    #[test]
    fn test_compares_with_peers_unless_told_otherwise() {
        let args = vec![];
        assert_eq!(parsed(&["test"]), Ok(Command::Test { peers: true, args }));
        let (peers, args) = (false, os(&["nf4"]));
        assert_eq!(parsed(&["test", "--no-peers", "--", "nf4"]), Ok(Command::Test { peers, args }));
    }

    #[test]
    fn a_device_asks_for_a_bundle() {
        let bundle = |out: Option<&str>, tar, stand_in| {
            Ok(Command::Bundle(Bundle { out: out.map(PathBuf::from), tar, stand_in }))
        };
        assert_eq!(parsed(&["test", "--device", "cuda"]), bundle(None, false, None));
        let given = ["test", "--tar", "--device", "cuda", "--out", "away"];
        assert_eq!(parsed(&given), bundle(Some("away"), true, None));
        let given = ["test", "--device", "stand-in", "--", "resume"];
        assert_eq!(parsed(&given), bundle(None, false, Some(os(&["resume"]))));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (args, named) in [
            (&["test", "--device", "tpu"][..], "tpu"),
            (&["test", "--device"], "--device"),
            (&["test", "--device", "cuda", "--no-peers"], "--no-peers"),
            (&["test", "--device", "cuda", "--", "resume"], "passes no arguments on"),
            (&["tset"], "tset"),
            (&["setup", "--peer"], "--peer"),
            (&["test", "nf4"], "nf4"),
            (&["doc", "--", "x"], "doc"),
        ] {
            let error = parsed(args).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
