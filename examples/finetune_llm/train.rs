//! The run.

use super::args::Args;
use super::data::{Batch, Example, Reader};
use super::events::Events;
use super::llama::{self, Config, Llama};
use super::metrics::{Metrics, Row};
use super::{Result, plot, show};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tch_peft::{
    AdamW, Base, LoraConfig, LoraModel, Optimizer, Parts, QuantizeOptions, Run, Sampler, Schedule, Start,
    clip_grad_norm,
};

/// Examples held out at most.
const HELD_OUT: usize = 200;

/// How the run ended.
pub enum Outcome {
    Finished,
    /// By Ctrl-C, after a checkpoint.
    Interrupted,
}

/// Fine-tunes from the beginning, or from where an earlier process left off.
pub fn train(args: &Args) -> Result<Outcome> {
    let stop = stop_on_ctrl_c()?;
    let settings = Config::read(&args.model)?;
    let reader = Reader::new(&args.model, settings.eos(), args.length)?;
    let (examples, held_out) = examples(args, &reader)?;
    println!("{} examples to learn from, {} held out", examples.len(), held_out.len());

    let base = load(args, &settings)?;
    let config = LoraConfig::builder()
        .r(args.r)
        .lora_alpha(args.alpha)
        .lora_dropout(args.dropout)
        .target_modules(args.targets.clone())
        .task_type("CAUSAL_LM")
        .base_model_name_or_path(&args.model.to_string_lossy())
        .build()?;
    tch::manual_seed(args.seed as i64);
    let mut model = LoraModel::wrap(base, config)?;
    println!("{}", model.summary());

    let mut optimizer = AdamW::builder().lr(args.lr).build(model.trainable_parameters())?;
    let schedule = Schedule::cosine(args.steps / 20, args.steps);
    let mut sampler = Sampler::new(examples.len(), args.batch, args.seed)?;
    let mut run = Run::builder(&args.out).every(args.every).keep(2).build()?;
    let start = run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
    if let Start::Resumed { step, differences, .. } = start {
        println!("going on after step {step}");
        differences.iter().for_each(|difference| println!("not bit by bit as before: {difference}"));
    }

    let mut metrics = Metrics::open(&args.out.join("metrics.csv"), run.current_step())?;
    let mut events = Events::create(&args.out, run.current_step() + 1)?;
    let bar = show::bar(args.steps, run.current_step());
    while run.current_step() < args.steps && !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let batch = Batch::new(sampler.next_batch().into_iter().map(|n| &examples[n]), args.device);
        let loss = batch.loss(&model.forward(&batch.inputs)?);
        loss.f_backward()?;
        clip_grad_norm(&model.trainable_parameters(), 1.0)?;
        let learning_rate = optimizer.learning_rate();
        optimizer.step()?;
        optimizer.zero_grad()?;
        let loss = f32::try_from(&loss)?;
        let tokens_per_second = batch.tokens as f64 / began.elapsed().as_secs_f64();

        let step = run.current_step() + 1;
        let evaluated = step.is_multiple_of(args.eval_every) || step == args.steps;
        let held_out = if evaluated { Some(evaluate(&mut model, &held_out, args)?) } else { None };
        let row = Row { step, loss, learning_rate, tokens_per_second, held_out };
        metrics.append(row)?;
        let speed = tokens_per_second as f32;
        events
            .scalars(step, &[("loss", loss), ("learning_rate", learning_rate as f32), ("tokens_per_second", speed)])?;
        if let Some(held_out) = held_out {
            events.scalars(step, &[("held_out_loss", held_out)])?;
            bar.suspend(|| println!("step {step}  held-out loss {held_out:.4}  {}", show::text(&row)));
        }
        bar.set_message(show::text(&row));
        bar.inc(1);
        run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
    }
    bar.abandon();

    plot::draw(&args.out.join("loss.png"), &metrics.rows)?;
    if run.current_step() < args.steps {
        run.save(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
        println!("saved after step {}; the same command goes on", run.current_step());
        return Ok(Outcome::Interrupted);
    }
    model.save_pretrained(args.out.join("adapter"))?;
    println!("the adapter is in {}", args.out.join("adapter").display());
    Ok(Outcome::Finished)
}

/// Set by Ctrl-C; the step is finished and saved. A second one ends the process.
fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing the step; Ctrl-C once more ends at once");
    })?;
    Ok(stop)
}

/// What is learnt, and what is held out.
fn examples(args: &Args, reader: &Reader) -> Result<(Vec<Example>, Vec<Example>)> {
    let mut examples = reader.read(&args.data)?;
    let mut held_out = match &args.eval {
        Some(path) => reader.read(path)?,
        None if examples.len() < 2 => return Err("one example is too little: give more, or --eval".into()),
        None => examples.split_off(examples.len() - (examples.len() / 20).max(1)),
    };
    held_out.truncate(HELD_OUT);
    Ok((examples, held_out))
}

/// The base, packed weight by weight as it is read.
fn load(args: &Args, settings: &Config) -> Result<Base<Llama>> {
    let config = args.quantize.clone().map(|scheme| scheme.skip(["lm_head"]).build()).transpose()?;
    let bar = show::bar(0, 0);
    let options = QuantizeOptions::new().progress(|progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    });
    let kind = args.dtype.unwrap_or(settings.kind());
    let base = llama::load(&args.model, args.device, kind, config.as_ref(), options)?;
    bar.finish_and_clear();
    let report = base.quantization_report();
    println!(
        "{} weights packed: {:.1} MB, {:.1} MB if dense",
        report.weights().len(),
        report.bytes_after() as f64 / 1e6,
        report.bytes_before() as f64 / 1e6
    );
    Ok(base)
}

/// The mean loss over the examples, in nats a token, without dropout.
fn evaluate(model: &mut LoraModel<Llama>, examples: &[Example], args: &Args) -> Result<f32> {
    model.eval()?;
    let (mut sum, mut tokens) = (0.0, 0);
    for examples in examples.chunks(args.batch) {
        let _no_grad = tch::no_grad_guard();
        let batch = Batch::new(examples, args.device);
        sum += f64::try_from(batch.loss(&model.forward(&batch.inputs)?))? * batch.tokens as f64;
        tokens += batch.tokens;
    }
    model.train()?;
    Ok((sum / tokens as f64) as f32)
}
