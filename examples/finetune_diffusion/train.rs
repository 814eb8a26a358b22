//! The run.

use super::Result;
use super::args::Args;
use super::data::{self, Batch, Example};
use super::denoiser::Denoiser;
use super::flow::{self, Flow};
use super::record::Place;
use super::training::log::Log;
use super::training::metrics::Row;
use super::training::{Outcome, show, stop_on_ctrl_c};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::time::Instant;
use tch_peft::{
    AdamW, AdapterFile, AdapterFormat, Base, Generator, LoraModel, Optimizer, Parts, Run, Sampler, TorchScript,
    clip_grad_norm,
};

/// What stays dense, as in SimpleTuner: modules with one of these in their names.
const DENSE: [&str; 6] = ["norm", "embed", "proj_out", "time_", "condition_", "caption_"];

/// How often a held-out image is evaluated, each time at another noise.
const DRAWS: usize = 4;

/// What a run must have in common with the one that it goes on with, besides
/// what checkpoints compare.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Task {
    data: String,
    held_out: usize,
    flow: Flow,
    guidance: f64,
}

/// Fine-tunes from the beginning, or from where an earlier process left off.
pub fn train(args: &Args) -> Result<Outcome> {
    let stop = stop_on_ctrl_c()?;
    let options = &args.options;
    let device = args.place.device;
    let denoiser = Denoiser::read(&args.model, args.guidance, args.place)?;
    let (mut examples, data) = data::read(args, &denoiser)?;
    let held_out = examples.split_off(examples.len().saturating_sub(args.held_out));
    println!("{} images to learn from, {} held out", examples.len(), held_out.len());

    let base = load(args)?;
    tch::manual_seed(options.seed as i64);
    let mut model = match &args.init_lora {
        Some(file) => LoraModel::init_lora(base, file)?,
        None => LoraModel::wrap(base, options.lora(&args.model).build()?)?,
    };
    println!("{}", model.summary());

    let mut optimizer = AdamW::builder().lr(options.lr).build(model.trainable_parameters())?;
    let schedule = options.schedule();
    let mut sampler = Sampler::new(examples.len(), options.batch, options.seed)?;
    let mut generator = Generator::new(options.seed);
    let mut run = Run::builder(&options.out).every(options.every).keep(2).build()?;
    let start = run.resume_or_start(
        &mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler).with("noise", &mut generator),
    )?;
    show::start(&start);
    let task = Task { data, held_out: held_out.len(), flow: args.flow, guidance: args.guidance };
    match run.user_state::<Task>()? {
        Some(recorded) if recorded != task => {
            return Err(format!("the run was begun with {recorded:?}; given is {task:?}").into());
        }
        _ => run.set_user_state(&task)?,
    }

    let mut log = Log::open(&options.out, run.current_step(), options.steps, "images")?;
    while run.current_step() < options.steps && !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let batch = Batch::new(sampler.next_batch().into_iter().map(|n| &examples[n]), device)?;
        let draw = args.flow.draw(&mut generator, &batch.latents)?;
        let loss = flow::loss(&model, &denoiser, &batch, &draw)?;
        loss.f_backward()?;
        clip_grad_norm(&model.trainable_parameters(), 1.0)?;
        let learning_rate = optimizer.learning_rate();
        optimizer.step()?;
        optimizer.zero_grad()?;
        let loss = f32::try_from(&loss)?;
        let speed = batch.len() as f64 / began.elapsed().as_secs_f64();

        let step = run.current_step() + 1;
        let evaluated = !held_out.is_empty() && (step.is_multiple_of(options.eval_every) || step == options.steps);
        let held_out = if evaluated { Some(evaluate(&mut model, &denoiser, &held_out, args)?) } else { None };
        log.step(Row { step, loss, learning_rate, held_out }, speed)?;
        run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler).with("noise", &mut generator))?;
    }

    log.close("mean square error of the velocity")?;
    if run.current_step() < options.steps {
        run.save(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler).with("noise", &mut generator))?;
        println!("saved after step {}; the same command goes on", run.current_step());
        return Ok(Outcome::Interrupted);
    }
    let file = options.out.join("pytorch_lora_weights.safetensors");
    model.save_as("default", AdapterFormat::Diffusers, AdapterFile::new(&file).component("transformer"))?;
    println!("the adapter is {}", file.display());
    Ok(Outcome::Finished)
}

/// The base, packed.
fn load(args: &Args) -> Result<Base<TorchScript>> {
    let (module, Place { device, kind }) = (args.model.join("model.pt"), args.place);
    let base = match kind {
        Some(kind) => Base::torchscript_to(module, device, kind)?,
        None => Base::torchscript_on_device(module, device)?,
    };
    let Some(scheme) = args.options.quantize.clone() else { return Ok(base) };
    let dense = base.layer_names().into_iter().filter(|module| DENSE.iter().any(|part| module.contains(part)));
    let config = scheme.skip(dense).build()?;
    show::packing(|options| Ok(base.quantize_with(&config, options)?))
}

/// The mean loss over the examples, at the same noise each time, without dropout.
fn evaluate(model: &mut LoraModel<TorchScript>, denoiser: &Denoiser, examples: &[Example], args: &Args) -> Result<f32> {
    model.eval()?;
    let mut generator = Generator::new(args.options.seed);
    let mut sum = 0.0;
    for _ in 0..DRAWS {
        for examples in examples.chunks(args.options.batch) {
            let _no_grad = tch::no_grad_guard();
            let batch = Batch::new(examples, args.place.device)?;
            let draw = args.flow.draw(&mut generator, &batch.latents)?;
            sum += f64::try_from(flow::loss(model, denoiser, &batch, &draw)?)? * batch.len() as f64;
        }
    }
    model.train()?;
    Ok((sum / (DRAWS * examples.len()) as f64) as f32)
}
