//! The files of the Python peer, and the program as a process.

use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use ureq::Body;
use ureq::http::{Request, Response};

/// What `peer.py` makes, once for all tests; none where the Python peers are switched off.
pub fn files() -> Option<&'static Path> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let usual = || root.join("../../target/python/bin/python").into();
        let python: OsString = std::env::var_os("TCH_PEFT_PYTHON").unwrap_or_else(usual);
        if python.is_empty() || std::env::var_os("TCH_PEFT_NO_PEERS").is_some_and(|value| value == "1") {
            eprintln!("without the Python peers: this test checks nothing");
            return None;
        }
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serve");
        if dir.exists() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        std::fs::create_dir_all(&dir).unwrap();
        let mut command = Command::new(&python);
        command.arg(root.join("tests/peer.py")).arg("make").arg(&dir);
        command.env("PYTHONDONTWRITEBYTECODE", "1").env("HF_HUB_OFFLINE", "1");
        let output = command.output().unwrap_or_else(|error| panic!("{}: {error}", python.display()));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(dir)
    });
    made.as_deref()
}

/// What transformers and PEFT answer.
pub struct Texts(Value);

impl Texts {
    /// On one of the two models.
    pub fn read(dir: &Path, folder: &str) -> Self {
        let text = std::fs::read_to_string(dir.join("expected.json")).unwrap();
        Texts(serde_json::from_str::<Value>(&text).unwrap()[folder].take())
    }

    pub fn of(&self, name: &str) -> &Vec<Value> {
        self.0[name].as_array().unwrap()
    }
}

/// The program on this model with the three adapters, on the CPU and a free port.
pub fn command(dir: &Path, folder: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve"));
    command.arg("--model").arg(dir.join(folder)).arg("--adapters").arg(dir.join("adapters"));
    command.args(["--device", "cpu", "--address", "127.0.0.1:0"]).env("OMP_NUM_THREADS", "1");
    command
}

/// A running server, killed in the end.
pub struct Server {
    child: Child,
    /// HOST:PORT
    pub address: String,
}

impl Server {
    pub fn start(dir: &Path, folder: &str, more: &[&str]) -> Self {
        let mut command = command(dir, folder);
        command.args(more);
        Self::run(command)
    }

    /// Started by this command.
    pub fn run(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("{line:?}"));
        Server { child, address: address.into() }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request for a completion.
    pub fn post(&self, body: &str) -> Response<Body> {
        run("POST", &self.url("/v1/completions"), body)
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end, which is a good one.
    pub fn wait(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    pub fn stop(self) {
        self.signal("INT");
        self.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(method: &str, url: &str, body: &str) -> Response<Body> {
    let config = ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).build();
    let request = Request::builder().method(method).uri(url).body(body.to_string()).unwrap();
    ureq::Agent::new_with_config(config).run(request).unwrap_or_else(|error| panic!("{method} {url}: {error}"))
}

/// The status and the JSON of an answer.
pub fn send(method: &str, url: &str, body: &str) -> (u16, Value) {
    let mut response = run(method, url, body);
    let text = response.body_mut().read_to_string().unwrap();
    (response.status().as_u16(), serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}")))
}

/// A completion, which there must be.
#[track_caller]
pub fn ask(server: &Server, body: &Value) -> Value {
    let (status, answer) = send("POST", &server.url("/v1/completions"), &body.to_string());
    assert_eq!(status, 200, "{body}: {answer}");
    answer
}

/// The likeliest completion of the case's prompt.
#[track_caller]
pub fn completion(server: &Server, model: &str, case: &Value, max_tokens: usize) -> Value {
    ask(server, &json!({ "model": model, "prompt": case["prompt"], "max_tokens": max_tokens, "temperature": 0 }))
}

/// A number of `/metrics`.
pub fn metric(server: &Server, name: &str) -> f64 {
    let text = run("GET", &server.url("/metrics"), "").body_mut().read_to_string().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
}
