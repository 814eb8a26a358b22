//! The commands of docs/serving.md, with what it says that they print.

use crate::common::{Server, files, send};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with what the guide names.
fn folder(dir: &Path) -> PathBuf {
    let folder = dir.join("guide");
    fs::create_dir_all(folder.join("adapters")).unwrap();
    for (from, to) in [("dense", "Qwen3-0.6B"), ("adapters/poet", "adapters/poet")] {
        symlink(dir.join(from), folder.join(to)).unwrap();
    }
    folder
}

/// The blocks of commands.
fn blocks() -> Vec<String> {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/serving.md");
    let text = fs::read_to_string(guide).unwrap();
    let blocks = text.split("```console\n").skip(1);
    blocks.map(|rest| rest.split("```").next().unwrap().to_string()).collect()
}

/// Without its numbers.
fn shape(line: &str) -> String {
    line.split(|c: char| c.is_ascii_digit() || c == '.').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("0")
}

/// The program with the arguments of the guide, and these.
fn program(folder: &Path, arguments: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve"));
    let arguments = arguments.replacen("DIR", "Qwen3-0.6B", 1).replacen("DIR", "../adapters", 1);
    command
        .args(arguments.split_whitespace())
        .args(["--device", "cpu"])
        .args(more)
        .current_dir(folder)
        .env("OMP_NUM_THREADS", "1");
    command
}

#[test]
fn the_commands_of_the_guide_run_and_print_what_it_shows() {
    let Some(dir) = files() else { return };
    let folder = folder(dir);
    let (mut server, mut run) = (None::<Server>, 0);
    for block in blocks() {
        let (commands, printed): (Vec<&str>, Vec<&str>) = block.lines().partition(|line| line.starts_with("$ "));
        for command in commands {
            run += 1;
            match command.strip_prefix("$ ").unwrap().split_once(' ').unwrap() {
                ("cd", to) => assert_eq!(to, "examples/serve"),
                ("curl", rest) => {
                    let (url, body) = rest.split_once(" -d ").unwrap();
                    let path = url.strip_prefix("localhost:8080").unwrap();
                    let server = server.as_ref().unwrap();
                    let (status, answer) = send("POST", &server.url(path), body.trim_matches('\''));
                    assert_eq!(status, 200, "{command}: {answer}");
                }
                ("cargo", rest) => match rest.strip_prefix("run --release -- ").unwrap() {
                    bench if bench.starts_with("bench ") => {
                        let output = program(&folder, bench, &["--seconds", "0.5"]).output().unwrap();
                        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                    }
                    serve => {
                        let mut command = program(&folder, serve, &["--address", "127.0.0.1:0"]);
                        command.stderr(fs::File::create(folder.join("said")).unwrap());
                        let started = server.insert(Server::run(command));
                        let said = fs::read_to_string(folder.join("said")).unwrap();
                        let said = format!("{said}listening on http://{}", started.address);
                        let shapes = |lines: &[&str]| lines.iter().map(|line| shape(line)).collect::<Vec<_>>();
                        assert_eq!(shapes(&said.lines().collect::<Vec<_>>()), shapes(&printed));
                    }
                },
                (other, _) => panic!("{other} is not known here"),
            }
        }
    }
    assert_eq!(run, 4, "commands");
}
