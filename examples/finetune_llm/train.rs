//! The run.

use super::Result;
use super::args::Args;
use super::data::{Batch, Example, Reader};
use super::llama::{self, Config, Llama};
use super::training::log::Log;
use super::training::metrics::Row;
use super::training::{Outcome, show, stop_on_ctrl_c};
use std::sync::atomic::Ordering;
use std::time::Instant;
use tch_peft::{AdamW, Base, LoraModel, Optimizer, Parts, Run, Sampler, clip_grad_norm};

/// Examples held out at most.
const HELD_OUT: usize = 200;

/// Fine-tunes from the beginning, or from where an earlier process left off.
pub fn train(args: &Args) -> Result<Outcome> {
    let stop = stop_on_ctrl_c()?;
    let options = &args.options;
    let settings = Config::read(&args.model)?;
    let reader = Reader::new(&args.model, settings.eos(), args.length)?;
    let (examples, held_out) = examples(args, &reader)?;
    println!("{} examples to learn from, {} held out", examples.len(), held_out.len());

    let base = load(args, &settings)?;
    let config = options.lora(&args.model).task_type("CAUSAL_LM").build()?;
    tch::manual_seed(options.seed as i64);
    let mut model = LoraModel::wrap(base, config)?;
    println!("{}", model.summary());

    let mut optimizer = AdamW::builder().lr(options.lr).build(model.trainable_parameters())?;
    let schedule = options.schedule();
    let mut sampler = Sampler::new(examples.len(), options.batch, options.seed)?;
    let mut run = Run::builder(&options.out).every(options.every).keep(2).build()?;
    let start = run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
    show::start(&start);

    let mut log = Log::open(&options.out, run.current_step(), options.steps, "tokens")?;
    while run.current_step() < options.steps && !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let batch = Batch::new(sampler.next_batch().into_iter().map(|n| &examples[n]), args.device);
        let loss = batch.loss(&model.forward(&batch.inputs)?);
        loss.f_backward()?;
        clip_grad_norm(&model.trainable_parameters(), 1.0)?;
        let learning_rate = optimizer.learning_rate();
        optimizer.step()?;
        optimizer.zero_grad()?;
        let loss = f32::try_from(&loss)?;
        let speed = batch.tokens as f64 / began.elapsed().as_secs_f64();

        let step = run.current_step() + 1;
        let evaluated = step.is_multiple_of(options.eval_every) || step == options.steps;
        let held_out = if evaluated { Some(evaluate(&mut model, &held_out, args)?) } else { None };
        log.step(Row { step, loss, learning_rate, held_out }, speed)?;
        run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
    }

    log.close("loss, nats a token")?;
    if run.current_step() < options.steps {
        run.save(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
        println!("saved after step {}; the same command goes on", run.current_step());
        return Ok(Outcome::Interrupted);
    }
    model.save_pretrained(options.out.join("adapter"))?;
    println!("the adapter is in {}", options.out.join("adapter").display());
    Ok(Outcome::Finished)
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
    let config = args.options.quantize.clone().map(|scheme| scheme.skip(["lm_head"]).build()).transpose()?;
    let kind = args.dtype.unwrap_or(settings.kind());
    show::packing(|options| llama::load(&args.model, args.device, kind, config.as_ref(), options))
}

/// The mean loss over the examples, in nats a token, without dropout.
fn evaluate(model: &mut LoraModel<Llama>, examples: &[Example], args: &Args) -> Result<f32> {
    model.eval()?;
    let (mut sum, mut tokens) = (0.0, 0);
    for examples in examples.chunks(args.options.batch) {
        let _no_grad = tch::no_grad_guard();
        let batch = Batch::new(examples, args.device);
        sum += f64::try_from(batch.loss(&model.forward(&batch.inputs)?))? * batch.tokens as f64;
        tokens += batch.tokens;
    }
    model.train()?;
    Ok((sum / tokens as f64) as f32)
}
