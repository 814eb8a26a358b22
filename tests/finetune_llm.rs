//! The example that fine-tunes a language model, run as a program and stopped on its way.
#![cfg(unix)]

mod common;

#[allow(dead_code)]
#[path = "../examples/finetune_llm/main.rs"]
mod example;

use std::path::Path;
use std::process::Command;

use common::{assert_close, peer, program, read};
use example::data::{Batch, Example, Reader};
use example::training::events;
use example::training::metrics::Metrics;
use serde_json::Value;
use tch::{Device, Kind};
use tch_peft::{LoraModel, QuantizeOptions};

const STEPS: u64 = 400;

/// The model and the texts of the peer, made once.
fn files() -> Option<&'static Path> {
    common::made("finetune_llm", "finetune_llm.py", &["make"])
}

/// Not a test: what the child processes run.
#[test]
#[ignore = "the program itself, for the other tests"]
fn program() {
    program::child(example::run);
}

/// A process of the program, writing into `out`.
fn command(dir: &Path, out: &str, more: &[&str]) -> Command {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let mut arguments = vec!["--model".into(), path("model"), "--data".into(), path("data.jsonl")];
    arguments.extend(["--out".into(), path(out)]);
    let settings = "--device cpu --r 4 --batch 4 --length 20 --lr 5e-3 --every 30 --eval-every 50 --steps";
    arguments.extend(settings.split(' ').map(String::from));
    arguments.push(STEPS.to_string());
    arguments.extend(more.iter().map(|argument| argument.to_string()));
    program::command(&arguments)
}

#[test]
fn a_run_that_was_interrupted_goes_on_to_the_same_bytes() {
    let Some(dir) = files() else { return };
    let text = program::finished(command(dir, "straight", &[]));
    assert!(text.contains("14 weights packed"), "{text}");
    let metrics = |out: &str| dir.join(out).join("metrics.csv");
    let straight = Metrics::open(&metrics("straight"), STEPS).unwrap().rows;
    assert_eq!(straight.iter().map(|row| row.step).collect::<Vec<_>>(), (1..=STEPS).collect::<Vec<_>>());
    let held_out: Vec<f32> = straight.iter().filter_map(|row| row.held_out).collect();
    assert_eq!(held_out.len(), 8);
    assert!(held_out[7] < 0.8 * straight[0].loss, "nothing was learnt: {} to {held_out:?}", straight[0].loss);

    let adapter = |out: &str| dir.join(out).join("adapter/adapter_model.safetensors");
    for (n, steps) in [8, 70].into_iter().enumerate() {
        let (code, done) = program::stopped(command(dir, "stopped", &[]), &dir.join("stopped"), "-INT", steps);
        assert_eq!(code, Some(130));
        assert!((steps..STEPS as usize).contains(&done), "{done}");
        assert!(!adapter("stopped").exists());
        // A checkpoint of the very step that was the last one.
        assert!(dir.join(format!("stopped/checkpoint-{done:08}")).is_dir(), "interruption {n} after step {done}");
    }
    let text = program::finished(command(dir, "stopped", &[]));
    assert!(text.contains("going on after step"), "{text}");

    assert!(std::fs::read(adapter("stopped")).unwrap() == std::fs::read(adapter("straight")).unwrap());
    assert!(std::fs::read(metrics("stopped")).unwrap() == std::fs::read(metrics("straight")).unwrap());
    let pictures = ["straight", "stopped"].map(|out| std::fs::read(dir.join(out).join("loss.png")).unwrap());
    assert!(pictures[0] == pictures[1] && pictures[0].starts_with(b"\x89PNG"));
    let events = std::fs::read_dir(dir.join("stopped")).unwrap();
    let events = events.filter(|file| file.as_ref().unwrap().file_name().to_str().unwrap().contains("tfevents"));
    assert_eq!(events.count(), 3, "one file of each process");

    // The adapter works in PEFT as it does here, over the dense model.
    peer("finetune_llm.py", &["check".as_ref(), dir.as_os_str()]);
    let theirs = read(dir.join("logits.safetensors"));
    let base =
        example::llama::load(&dir.join("model"), Device::Cpu, Kind::Float, None, QuantizeOptions::new()).unwrap();
    let model = LoraModel::from_pretrained(base, dir.join("straight/adapter")).unwrap();
    let logits = tch::no_grad(|| model.forward(&theirs["tokens"])).unwrap();
    assert_close("logits", &logits, &theirs["logits"], 1e-5);
}

#[test]
fn another_command_does_not_go_on_with_the_run() {
    let Some(dir) = files() else { return };
    let few = ["--steps", "2", "--every", "1"];
    program::finished(command(dir, "other", &few));
    let error = program::refused(command(dir, "other", &["--steps", "2", "--r", "8"]));
    assert!(error.contains("r: "), "{error}");
}

#[test]
fn examples_are_those_of_the_python_tokenizer() {
    let Some(dir) = files() else { return };
    let expected: Value = serde_json::from_slice(&std::fs::read(dir.join("ids.json")).unwrap()).unwrap();
    let ids = |list: &Value| -> Vec<i64> { list.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect() };

    let reader = Reader::new(&dir.join("model"), Some(0), 50).unwrap();
    let found = reader.read(&dir.join("data.jsonl")).unwrap();
    let lines = expected["lines"].as_array().unwrap().iter();
    let lines: Vec<Example> =
        lines.map(|line| Example { tokens: ids(&line[0]), learnt: line[1].as_u64().unwrap() as usize }).collect();
    assert_eq!(found, lines);
    assert!(found.iter().any(|example| example.learnt > 2));

    // Windows that overlap by one token: each but the first is predicted once.
    let windows = reader.read(&dir.join("data.txt")).unwrap();
    let mut text = vec![windows[0].tokens[0]];
    for window in &windows {
        assert_eq!((text.last(), window.learnt), (window.tokens.first(), 1));
        text.extend(&window.tokens[1..]);
    }
    assert_eq!(text, ids(&expected["text"]));
    assert!(windows.len() > 10 && windows.iter().rev().skip(1).all(|window| window.tokens.len() == 51));

    let bad = dir.join("bad.jsonl");
    std::fs::write(&bad, "{\"text\": \"the cat\"}\n{\"prompt\": \"the\"}\n").unwrap();
    let error = reader.read(&bad).unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("completion"), "{error}");
}

/// The loss of a padded batch is that of its examples, weighted by their tokens.
#[test]
fn padding_changes_no_loss() {
    let Some(dir) = files() else { return };
    let base =
        example::llama::load(&dir.join("model"), Device::Cpu, Kind::Float, None, QuantizeOptions::new()).unwrap();
    let example = |tokens: &[i64], learnt| Example { tokens: tokens.into(), learnt };
    let examples = [example(&[1, 4, 9, 2, 0], 3), example(&[1, 7, 0], 1), example(&[1, 3, 5, 8, 11, 12, 0], 2)];
    let loss = |examples: &[Example]| {
        use tch::nn::Module;
        let batch = Batch::new(examples, Device::Cpu);
        let _no_grad = tch::no_grad_guard();
        (f64::try_from(batch.loss(&base.module().forward(&batch.inputs))).unwrap(), batch.tokens)
    };
    let alone: Vec<(f64, i64)> = examples.iter().map(|one| loss(std::slice::from_ref(one))).collect();
    assert_eq!(alone.iter().map(|(_, tokens)| *tokens).collect::<Vec<_>>(), [2, 2, 5]);
    let expected = alone.iter().map(|(loss, tokens)| loss * *tokens as f64).sum::<f64>() / 9.0;
    let (found, tokens) = loss(&examples);
    assert!(tokens == 9 && (found - expected).abs() < 1e-5, "{found} instead of {expected}");
}

/// As tensorboard 2.21 writes the same event: `RecordWriter` on the bytes of
/// `Event(wall_time=1700000000.25, step=300, summary=Summary(value=[Value(tag="loss",
/// simple_value=2.75), Value(tag="learning_rate", simple_value=1e-4)]))`.
#[test]
fn events_are_those_of_tensorboard() {
    const RECORD: &str = "31000000000000009d8383e90900001040fc54d94110ac022a230a0b0a046c6f73731500003040\
        0a140a0d6c6561726e696e675f726174651517b7d138543ef38d";
    let event = events::scalars(1_700_000_000.25, 300, &[("loss", 2.75), ("learning_rate", 1e-4)]);
    let hex: String = events::record(&event).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, RECORD);
}
