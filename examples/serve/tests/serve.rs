//! The program as its users have it: a process, asked over HTTP. What it answers is
//! compared with transformers' and PEFT's greedy completions.
#![cfg(unix)]

mod common;
mod guide;

use common::{Server, Texts, ask, completion, files, metric, send};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Each of the models' names with each prompt, and what is to come of it.
fn cases(texts: &Texts) -> Vec<(&'static str, &Value)> {
    let names = ["base", "poet", "clerk", "sailor"];
    names.into_iter().flat_map(|name| texts.of(name).iter().map(move |case| (name, case))).collect()
}

#[track_caller]
fn check(model: &str, case: &Value, answer: &Value) {
    assert_eq!(answer["choices"][0]["text"], case["text"], "{model}, {}: {answer}", case["prompt"]);
    assert_eq!(answer["choices"][0]["finish_reason"], case["finish"], "{answer}");
    assert_eq!(answer["model"], model);
    let (prompt, tokens) = (case["prompt_tokens"].as_u64().unwrap(), case["tokens"].as_u64().unwrap());
    let usage = json!({ "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens });
    assert_eq!(answer["usage"], usage);
}

/// On dense weights, and on files that bitsandbytes packed; alone, and all at once, in batches that
/// mix the adapters, prompts of 2 to 24 tokens and answers. Prompts come in pieces of 16 tokens.
#[test]
fn completions_are_those_of_transformers_and_peft_alone_and_in_mixed_batches() {
    let Some(dir) = files() else { return };
    for (folder, scheme) in [("dense", "none"), ("packed", "nf4")] {
        let texts = Texts::read(dir, folder);
        let server = Server::start(dir, folder, &["--scheme", scheme, "--step-tokens", "16"]);
        let cases = cases(&texts);
        for (model, case) in &cases {
            check(model, case, &completion(&server, model, case, 12));
        }
        assert_eq!(metric(&server, "serve_batch_rows_mean"), 1.0);
        let steps = metric(&server, "serve_steps_total");
        thread::scope(|scope| {
            for (model, case) in &cases {
                let server = &server;
                scope.spawn(move || check(model, case, &completion(server, model, case, 12)));
            }
        });
        let batched = metric(&server, "serve_steps_total") - steps;
        assert!(batched < steps / 2.0, "{batched} steps together, {steps} alone");
        let requests = 2.0 * cases.len() as f64;
        assert_eq!(metric(&server, "serve_requests_total{outcome=\"completed\"}"), requests);
        assert_eq!(metric(&server, "serve_request_seconds_count"), requests);
        assert!(metric(&server, "serve_request_seconds{quantile=\"0.99\"}") > 0.0);
        let tokens: f64 = cases.iter().map(|(_, case)| case["tokens"].as_f64().unwrap()).sum();
        assert!(metric(&server, "serve_tokens_total{of=\"completion\"}") >= 2.0 * tokens);
        assert_eq!(metric(&server, "serve_queue_length"), 0.0);
        server.stop();
    }
}

#[test]
fn one_adapter_at_a_time_gives_the_same_answers() {
    let Some(dir) = files() else { return };
    let texts = Texts::read(dir, "dense");
    let server = Server::start(dir, "dense", &["--scheme", "none", "--batching", "single", "--rows", "2"]);
    thread::scope(|scope| {
        for (model, case) in cases(&texts) {
            let server = &server;
            scope.spawn(move || check(model, case, &completion(server, model, case, 12)));
        }
    });
    let rows = metric(&server, "serve_batch_rows_mean");
    assert!(rows > 1.0, "{rows} rows");
}

#[test]
fn an_answer_is_drawn_by_its_own_seed_and_ends_before_a_stop() {
    let Some(dir) = files() else { return };
    let texts = Texts::read(dir, "dense");
    let server = Server::start(dir, "dense", &["--scheme", "none"]);
    let drawn = |seed: u64| {
        let body = json!({ "model": "poet", "prompt": "bara", "max_tokens": 24, "temperature": 1.5, "seed": seed });
        ask(&server, &body)["choices"][0]["text"].as_str().unwrap().to_string()
    };
    let alone: Vec<String> = (0..6).map(drawn).collect();
    assert_ne!(alone[0], alone[1]);
    let together: Vec<String> = thread::scope(|scope| {
        let all: Vec<_> = (0..6).map(|seed| scope.spawn(move || drawn(seed))).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(together, alone);

    // From the third word on.
    let case = &texts.of("poet").iter().find(|case| case["tokens"].as_u64() > Some(5)).unwrap();
    let text = case["text"].as_str().unwrap();
    let stop = text.split(' ').nth(3).unwrap();
    let body = json!({ "model": "poet", "prompt": case["prompt"], "max_tokens": 12, "temperature": 0, "stop": stop });
    let answer = ask(&server, &body);
    assert_eq!(answer["choices"][0]["text"], text[..text.find(stop).unwrap()]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["usage"]["completion_tokens"].as_u64() < case["tokens"].as_u64());
}

/// What is in flight ends with the adapter it began with, also if that is deleted; what is sent after
/// the swap was answered has the new one; nothing is lost.
#[test]
fn adapters_are_swapped_under_load() {
    let Some(dir) = files() else { return };
    let texts = Texts::read(dir, "packed");
    let server = Server::start(dir, "packed", &["--rows", "5"]);
    let url = server.url("/v1/adapters/poet");
    let put = |path: &str| send("PUT", &url, &json!({ "path": path }).to_string());
    let (old, new) = (&texts.of("poet")[0], &texts.of("more/poet-2")[0]);
    let (long, done) = (&texts.of("long")[0], AtomicBool::new(false));
    thread::scope(|scope| {
        let others = ["base", "clerk", "poet", "poet"].map(|model| {
            let (server, texts, done) = (&server, &texts, &done);
            scope.spawn(move || {
                let mut seen = [0, 0];
                while !done.load(Ordering::Relaxed) {
                    let case = if model == "poet" { old } else { &texts.of(model)[0] };
                    let answer = completion(server, model, case, 12);
                    let is_new = model == "poet" && answer["choices"][0]["text"] == new["text"];
                    check(model, if is_new { new } else { case }, &answer);
                    seen[usize::from(is_new)] += 1;
                }
                seen
            })
        });
        let running = |so_far: f64| {
            let server = &server;
            let request = scope.spawn(move || completion(server, "poet", long, 400));
            while metric(server, "serve_steps_total") < so_far + 20.0 {
                thread::sleep(Duration::from_millis(1));
            }
            request
        };
        let in_flight = running(metric(&server, "serve_steps_total"));
        let (status, answer) = put("more/poet-2");
        assert_eq!((status, &answer["swapped"]), (200, &json!(true)), "{answer}");
        assert!(!in_flight.is_finished(), "the long request ended too soon to prove anything");
        check("poet", new, &completion(&server, "poet", new, 12));
        check("poet", long, &in_flight.join().unwrap());

        // Back, and once more with a request in flight, this time to nothing.
        assert_eq!(put("poet").0, 200);
        check("poet", old, &completion(&server, "poet", old, 12));
        thread::sleep(Duration::from_millis(100));
        done.store(true, Ordering::Relaxed);
        let seen = others.map(|thread| thread.join().unwrap());
        assert!(seen.iter().all(|seen| seen[0] > 0), "{seen:?}");
        let in_flight = running(metric(&server, "serve_steps_total"));
        assert_eq!(send("DELETE", &url, "").0, 200);
        assert!(!in_flight.is_finished(), "the long request ended too soon to prove anything");
        let (status, answer) = send("POST", &server.url("/v1/completions"), r#"{"model": "poet", "prompt": "bara"}"#);
        assert_eq!(status, 404, "{answer}");
        check("poet", long, &in_flight.join().unwrap());
    });

    let (status, answer) = put("more/poet-2");
    assert_eq!((status, &answer["swapped"]), (201, &json!(false)), "{answer}");
    check("poet", new, &completion(&server, "poet", new, 12));
    let (_, models) = send("GET", &server.url("/v1/models"), "");
    let names: Vec<&Value> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(json!(names), json!(["base", "clerk", "poet", "sailor"]));
    assert_eq!(metric(&server, "serve_requests_total{outcome=\"failed\"}"), 0.0);
    assert_eq!(metric(&server, "serve_requests_total{outcome=\"cancelled\"}"), 0.0);
}

#[test]
fn what_is_wrong_with_a_request_is_told() {
    let Some(dir) = files() else { return };
    let server = Server::start(dir, "dense", &["--max-length", "20"]);
    let outside = dir.join("dense").display().to_string();
    let long = vec!["bara"; 18].join(" ");
    let huge = "bara ".repeat(300_000);
    let post = "/v1/completions";
    for (method, path, body, status, told) in [
        ("POST", post, json!({ "model": "pirate", "prompt": "bara" }), 404, "base, clerk, poet, sailor"),
        ("POST", post, json!({ "model": "poet" }), 400, "prompt"),
        ("POST", post, json!({ "model": "poet", "prompt": 3 }), 400, "a list of token ids"),
        ("POST", post, json!({ "model": "poet", "prompt": "bara", "top_p": 0.5 }), 400, "top_p"),
        ("POST", post, json!({ "model": "poet", "prompt": "bara", "stream": true }), 400, "stream"),
        ("POST", post, json!({ "model": "poet", "prompt": "bara", "temperature": -1 }), 400, "temperature"),
        ("POST", post, json!({ "model": "poet", "prompt": "bara", "stop": [""] }), 400, "stop"),
        ("POST", post, json!({ "model": "poet", "prompt": "bara", "max_tokens": 0 }), 400, "max_tokens"),
        ("POST", post, json!({ "model": "poet", "prompt": [] }), 400, "prompt"),
        ("POST", post, json!({ "model": "poet", "prompt": [3, 59] }), 400, "59"),
        ("POST", post, json!({ "model": "poet", "prompt": [-1] }), 400, "-1"),
        ("POST", post, json!({ "model": "poet", "prompt": long, "max_tokens": 2 }), 400, "19 tokens"),
        ("POST", post, json!({ "model": "poet", "prompt": huge }), 413, "1048576"),
        ("PUT", "/v1/adapters/poet", json!({ "path": outside }), 403, "adapters"),
        ("PUT", "/v1/adapters/poet", json!({ "path": "../dense" }), 403, "adapters"),
        ("PUT", "/v1/adapters/poet", json!({ "path": "none" }), 422, "none"),
        ("PUT", "/v1/adapters/poet", json!({ "path": "more" }), 422, "adapter_config.json"),
        ("PUT", "/v1/adapters/poet", json!({ "folder": "poet" }), 400, "path"),
        ("PUT", "/v1/adapters/base", json!({ "path": "poet" }), 400, "other than base"),
        ("PUT", "/v1/adapters/a%20b", json!({ "path": "poet" }), 400, "letters"),
        ("DELETE", "/v1/adapters/pirate", json!({}), 404, "base, clerk, poet, sailor"),
        ("DELETE", "/v1/adapters/base", json!({}), 400, "other than base"),
        ("GET", post, json!({}), 405, "GET"),
        ("GET", "/v1/chat", json!({}), 404, "/v1/chat"),
    ] {
        let (found, answer) = send(method, &server.url(path), &body.to_string());
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!((found, &answer["error"]["code"]), (status, &json!(status)), "{method} {path}: {answer}");
        assert!(message.contains(told), "{method} {path}: {message}");
    }
    let (status, answer) = send("POST", &server.url(post), "{\"model\": ");
    assert_eq!(status, 400, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("line 1"), "{answer}");

    // As many tokens as there may be, and an adapter that a failed swap has left as it was.
    let fits = json!({ "model": "poet", "prompt": long, "max_tokens": 1, "temperature": 0 });
    assert_eq!(ask(&server, &fits)["usage"]["total_tokens"], 20);
}

#[test]
fn a_full_queue_refuses_and_clients_that_leave_make_room() {
    let Some(dir) = files() else { return };
    let texts = Texts::read(dir, "dense");
    let server = Server::start(dir, "dense", &["--scheme", "none", "--rows", "1", "--queue", "1"]);
    let long = &texts.of("long")[0];
    let until = |name: &str, value: f64| {
        let start = Instant::now();
        while metric(&server, name) != value {
            assert!(start.elapsed() < Duration::from_secs(20), "{name} isn't {value}");
            thread::sleep(Duration::from_millis(1));
        }
    };
    // Two clients that will not wait: one request runs, one waits.
    let body = json!({ "model": "poet", "prompt": long["prompt"], "max_tokens": 400, "temperature": 0 }).to_string();
    let begin = || {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let head = format!("POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    };
    let first = begin();
    while metric(&server, "serve_steps_total") == 0.0 {}
    let second = begin();
    until("serve_queue_length", 1.0);

    let refused = server.post(&body);
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    drop((first, second));
    until("serve_requests_total{outcome=\"cancelled\"}", 2.0);
    check("poet", long, &completion(&server, "poet", long, 400));
    assert_eq!(metric(&server, "serve_requests_total{outcome=\"refused\"}"), 1.0);
    assert_eq!(metric(&server, "serve_requests_total{outcome=\"completed\"}"), 1.0);
}

#[test]
fn what_was_begun_is_finished_at_the_end() {
    let Some(dir) = files() else { return };
    let texts = Texts::read(dir, "dense");
    for signal in ["INT", "TERM"] {
        let server = Server::start(dir, "dense", &["--scheme", "none", "--rows", "2"]);
        let long = &texts.of("long")[0];
        thread::scope(|scope| {
            let running = [(); 3].map(|()| scope.spawn(|| completion(&server, "poet", long, 400)));
            while metric(&server, "serve_queue_length") < 1.0 {}
            server.signal(signal);
            running.into_iter().for_each(|request| check("poet", long, &request.join().unwrap()));
        });
        let address = server.address.clone();
        server.wait();
        assert!(TcpStream::connect(address).is_err());
    }
}

#[test]
fn the_bench_measures_both_kinds_of_batching() {
    let Some(dir) = files() else { return };
    for more in [&["--clients", "3"][..], &["--clients", "3", "--rate", "20"]] {
        let mut command = common::command(dir, "packed");
        command.args(["bench", "--seconds", "1", "--prompt", "5", "--tokens", "4"]).args(more);
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        for line in ["base loaded in ", "poet loaded in ", "| Mixed | ", "| Single | ", "mixed batches give "] {
            assert!(text.lines().any(|found| found.starts_with(line)), "no {line:?} in\n{text}");
        }
    }
}
