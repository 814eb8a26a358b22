//! The example that fine-tunes a diffusion transformer, run as a program: its losses against diffusers and
//! PEFT, what it saves, stopped runs, and where its latents come from.
#![cfg(unix)]

mod common;

#[allow(dead_code)]
#[path = "../examples/finetune_diffusion/main.rs"]
mod example;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use common::{assert_close, assert_differs, assert_same, peer, program, read, write};
use example::denoiser::Denoiser;
use example::record::Place;
use example::training::metrics::Metrics;
use example::{images, latents};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, Generator, LoraModel, QuantConfig, Sampler};

const WEIGHTS: &str = "pytorch_lora_weights.safetensors";

/// The models and images of the peer, made once.
fn files() -> Option<&'static Path> {
    common::made("finetune_diffusion", "finetune_diffusion.py", &["make"])
}

/// Not a test: what the child processes run.
#[test]
#[ignore = "the program itself, for the other tests"]
fn program() {
    program::child(example::run);
}

/// A process of the program: words that begin with `@` are files in `dir`.
fn command(dir: &Path, arguments: &str) -> Command {
    let word = |word: &str| match word.strip_prefix('@') {
        Some(name) => dir.join(name).to_str().unwrap().to_string(),
        None => word.to_string(),
    };
    program::command(&arguments.split_whitespace().map(word).collect::<Vec<_>>())
}

struct Case {
    /// Of the exported transformer.
    family: &'static str,
    dtype: &'static str,
    scheme: &'static str,
    sigmas: &'static str,
    shift: f64,
}

const STEPS: u64 = 12;
const BATCH: usize = 4;

/// Losses, and what was saved, on a dense base and on SimpleTuner's.
#[test]
fn training_is_that_of_diffusers_and_peft() {
    let Some(dir) = files() else { return };
    let case = |family, dtype, scheme, sigmas, shift| Case { family, dtype, scheme, sigmas, shift };
    for case in [
        case("sd3", "f32", "none", "logit-normal", 3.0),
        case("sd3", "f32", "int8", "logit-normal", 3.0),
        case("sd3", "bf16", "none", "logit-normal", 3.0),
        case("flux", "f32", "none", "uniform", 1.0),
        case("sana", "f32", "none", "logit-normal", 1.0),
        case("aura-flow", "f32", "none", "uniform", 1.7),
    ] {
        let Case { family, dtype, scheme, sigmas, shift } = case;
        let run = format!("runs/{family}-{dtype}-{scheme}");
        let arguments = format!(
            "--model @{family} --dtype {dtype} --images @images --vae @vae --cache @cache --embeds @embeds.safetensors --out @{run} \
             --init-lora @{family}-start/{WEIGHTS} --scheme {scheme} --sigmas {sigmas} --shift {shift} \
             --guidance 3.5 --lr 1e-2 --batch {BATCH} --steps {STEPS} --seed 5"
        );
        let text = program::finished(command(dir, &arguments));
        assert!(text.contains("6 images to learn from, 0 held out"), "{text}");
        assert_eq!(text.contains("weights packed"), scheme == "int8", "{text}");

        let folder = dir.join(run);
        draws(&folder, &case);
        answer(dir, &folder, &case);
        let facts = json!({
            "family": family, "dtype": if dtype == "f32" { "float32" } else { "bfloat16" }, "scheme": scheme,
            "sigmas": sigmas, "shift": shift, "lr": 1e-2, "steps": STEPS,
        });
        std::fs::write(folder.join("run.json"), facts.to_string()).unwrap();
    }
    peer("finetune_diffusion.py", &["follow".as_ref(), dir.as_os_str()]);
}

/// What the run drew: the images, the noise, and what noise levels are made from.
fn draws(folder: &Path, case: &Case) {
    let mut sampler = Sampler::new(6, BATCH, 5).unwrap();
    let mut generator = Generator::new(5);
    let mut tensors = Vec::new();
    for step in 0..STEPS {
        let rows: Vec<i64> = sampler.next_batch().into_iter().map(|row| row as i64).collect();
        let count = rows.len() as i64;
        let noise = generator.normal(&[count, 4, 8, 8], Device::Cpu).unwrap();
        let level = match case.sigmas {
            "uniform" => generator.uniform(&[count], Device::Cpu).unwrap(),
            _ => generator.normal(&[count], Device::Cpu).unwrap(),
        };
        tensors.push((format!("{step}.rows"), Tensor::from_slice(&rows)));
        tensors.extend([(format!("{step}.noise"), noise), (format!("{step}.level"), level)]);
    }
    write(folder.join("draws.safetensors"), &tensors);
}

/// What the saved file gives here, on one batch.
fn answer(dir: &Path, folder: &Path, case: &Case) {
    let kind = if case.dtype == "f32" { Kind::Float } else { Kind::BFloat16 };
    let export = dir.join(case.family);
    let base = Base::torchscript_to(export.join("model.pt"), Device::Cpu, kind).unwrap();
    let base = match case.scheme {
        "int8" => {
            // Of the layers in DENSE of the peer's script, those that SD3 has.
            let dense = ["norm*.linear", "*embed*", "proj_out"];
            base.quantize(&QuantConfig::int8().skip(dense).build().unwrap()).unwrap()
        }
        _ => base,
    };
    let mut model = LoraModel::from_pretrained(base, folder.join(WEIGHTS)).unwrap();
    model.eval().unwrap();
    let mut generator = Generator::new(77);
    let mut normal = |shape: &[i64]| generator.normal(shape, Device::Cpu).unwrap();
    let conditions = BTreeMap::from([
        ("encoder_hidden_states".to_string(), normal(&[2, 12, 24])),
        ("pooled_projections".to_string(), normal(&[2, 20])),
    ]);
    let (noisy, sigmas) = (normal(&[2, 4, 8, 8]), normal(&[2]).sigmoid());
    let denoiser = Denoiser::read(&export, 3.5, Place { device: Device::Cpu, kind: Some(kind) }).unwrap();
    let velocity = tch::no_grad(|| denoiser.velocity(model.module(), &noisy, &sigmas, &conditions)).unwrap();
    let mut tensors: Vec<(String, Tensor)> = conditions.into_iter().collect();
    tensors.extend([("noisy".into(), noisy), ("sigmas".into(), sigmas), ("velocity".into(), velocity)]);
    write(folder.join("answer.safetensors"), &tensors);
}

/// Interrupted, then killed, on an nf4 base with dropout.
#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_bytes() {
    let Some(dir) = files() else { return };
    let run = |out: &str, more: &str| {
        let arguments = format!(
            "--model @sd3 --images @images --vae @vae --embeds @embeds.safetensors --out @{out} --scheme nf4 \
             --r 4 --dropout 0.1 --lr 5e-3 --batch 2 --held-out 2 --steps 300 --every 20 --eval-every 75 {more}"
        );
        command(dir, &arguments)
    };
    let text = program::finished(run("straight", ""));
    assert!(text.contains("4 images to learn from, 2 held out"), "{text}");
    let (straight, stopped) = (dir.join("straight"), dir.join("stopped"));
    assert_eq!(program::stopped(run("stopped", ""), &stopped, "-INT", 9).0, Some(130));
    assert!(!stopped.join(WEIGHTS).exists());
    let (code, done) = program::stopped(run("stopped", ""), &stopped, "-KILL", 130);
    assert_eq!((code, done < 300), (None, true));
    let text = program::finished(run("stopped", ""));
    assert!(text.contains("going on after step"), "{text}");
    for file in [WEIGHTS, "metrics.csv", "loss.png"] {
        let [found, expected] = [&stopped, &straight].map(|out| std::fs::read(out.join(file)).unwrap());
        assert!(found == expected, "{file}");
    }

    let rows = Metrics::open(&straight.join("metrics.csv"), 300).unwrap().rows;
    let held_out: Vec<f32> = rows.iter().filter_map(|row| row.held_out).collect();
    assert!(held_out.len() == 4 && held_out[3] < 0.9 * held_out[0].max(rows[0].loss), "{held_out:?}");

    // A run goes on with what it began with.
    for (change, word) in [("--shift 2", "shift: 3.0"), ("--guidance 2", "guidance: 1.0"), ("--r 8", "r: ")] {
        let error = program::refused(run("stopped", change));
        assert!(error.contains(word), "{change}: {error}");
    }
}

/// The latents' files in a folder, with when they were written.
fn cached(folder: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap());
    files.map(|file| (file.path(), file.metadata().unwrap().modified().unwrap())).collect()
}

#[test]
fn latents_are_those_of_diffusers_and_made_once() {
    let Some(dir) = files() else { return };
    let cache = common::fresh_dir("finetune_diffusion_cache");
    let (vae, folder) = (dir.join("vae"), common::fresh_dir("finetune_diffusion_images"));
    for file in std::fs::read_dir(dir.join("images")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    let made = latents::of_images(&folder, &vae, &cache, Device::Cpu).unwrap();
    let expected = read(dir.join("images.vae.safetensors"));
    assert!(made.by_name.keys().eq(expected.keys()));
    for (name, latents) in &made.by_name {
        assert_close(name, latents, &expected[name], 1e-5);
    }

    let first = cached(&cache);
    assert_eq!(first.len(), 1);
    let again = latents::of_images(&folder, &vae, &cache, Device::Cpu).unwrap();
    assert_eq!((cached(&cache), again.key), (first.clone(), made.key.clone()));
    assert_same("a", &again.by_name["a"], &made.by_name["a"]);

    // Another image of the same name; then one more.
    std::fs::copy(folder.join("b.png"), folder.join("a.png")).unwrap();
    let changed = latents::of_images(&folder, &vae, &cache, Device::Cpu).unwrap();
    assert_differs("a", &changed.by_name["a"], &made.by_name["a"], 1e-2);
    assert_same("b", &changed.by_name["b"], &made.by_name["b"]);
    std::fs::copy(folder.join("b.png"), folder.join("g.png")).unwrap();
    assert_eq!(latents::of_images(&folder, &vae, &cache, Device::Cpu).unwrap().by_name.len(), 7);
    assert_eq!(cached(&cache).len(), 3);

    // Whatever else lies in the folder; JPEG decoders differ in the last digit.
    let mixed = latents::of_images(&dir.join("mixed"), &vae, &cache, Device::Cpu).unwrap().by_name;
    let expected = read(dir.join("mixed.vae.safetensors"));
    assert!(mixed.keys().eq(["layer", "photo"]));
    assert_close("layer", &mixed["layer"], &expected["layer"], 1e-5);
    assert_close("photo", &mixed["photo"], &expected["photo"], 2e-2);

    // Sana's VAE, which has no distribution.
    let other = latents::of_images(&dir.join("images"), &dir.join("dc-vae"), &cache, Device::Cpu).unwrap().by_name;
    let expected = read(dir.join("images.dc-vae.safetensors"));
    assert!(other.keys().eq(expected.keys()));
    for (name, latents) in &other {
        assert_close(name, latents, &expected[name], 1e-5);
    }

    std::fs::copy(folder.join("b.png"), folder.join("g.jpg")).unwrap();
    let error = images::list(&folder).err().unwrap().to_string();
    assert!(error.contains("two images are called g"), "{error}");
    std::fs::write(folder.join("g.jpg"), "no image").unwrap();
    std::fs::remove_file(folder.join("g.png")).unwrap();
    let error = latents::of_images(&folder, &vae, &cache, Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("g.jpg"), "{error}");
}

/// Latents of other origin, no prompts, and what is missing is told.
#[test]
fn inputs_that_do_not_fit_are_refused() {
    let Some(dir) = files() else { return };
    let start = "--model @sd3 --steps 2 --batch 2 --r 2 --out @refused";
    let with = |more: &str| command(dir, &format!("{start} {more}"));
    let text = program::finished(with("--latents @images.vae.safetensors --unconditional"));
    assert!(text.contains("the adapter is"), "{text}");

    // Tensors for all images, of another length than the example's.
    let ones = |name: &str, sizes: &[i64]| (name.to_string(), Tensor::ones(sizes, (Kind::Float, Device::Cpu)));
    let file = |name: &str, tensors: &[(String, Tensor)]| write(dir.join(format!("{name}.safetensors")), tensors);
    let pooled = || ones("pooled_projections", &[20]);
    file("all", &[ones("encoder_hidden_states", &[5, 24]), pooled()]);
    program::finished(with("--latents @images.vae.safetensors --embeds @all.safetensors --out @refused-all"));
    file("one", &[ones("encoder_hidden_states", &[5, 24])]);
    file("wide", &[ones("encoder_hidden_states", &[5, 25]), pooled()]);
    file("large", &[ones("x", &[4, 8, 10]), ones("y", &[4, 8, 10])]);

    // A trace that keeps the dtype that it was made in.
    std::fs::create_dir_all(dir.join("bound")).unwrap();
    let record = std::fs::read_to_string(dir.join("sd3/export.json")).unwrap();
    let bound = record.replace("\"portable\": true", "\"portable\": false");
    assert_ne!(bound, record);
    std::fs::write(dir.join("bound/export.json"), bound).unwrap();

    let latents = "--latents @images.vae.safetensors";
    for (more, word) in [
        (format!("{latents} --embeds @one.safetensors"), "neither a.pooled_projections nor pooled_projections"),
        (format!("{latents} --embeds @wide.safetensors"), "[5, 25], expected [12, 24]"),
        ("--latents @large.safetensors --unconditional".into(), "[4, 8, 10] are not what the model takes, [4, 8, 8]"),
        (latents.into(), "--unconditional"),
        (format!("{latents} --images @images --unconditional"), "either --latents, or --images"),
        ("--images @images --unconditional".into(), "--vae is missing"),
        (format!("{latents} --unconditional --frames 2"), "no option --frames"),
        (format!("{latents} --unconditional --dtype f16"), "expected f32 or bf16"),
        (format!("{latents} --unconditional --model @bound --dtype bf16"), "it runs on cpu only"),
    ] {
        let error = program::refused(with(&more));
        assert!(error.contains(word), "{more}: {error}");
    }
}
