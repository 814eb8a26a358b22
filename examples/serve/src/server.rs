//! Loads everything, and runs the model's thread and the HTTP side.

use crate::args::Settings;
use crate::engine::Engine;
use crate::http::{App, router};
use crate::llama::{Config, Result};
use crate::queue::Queue;
use crate::shared::Shared;
use crate::text::Text;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub struct Server {
    pub address: SocketAddr,
    /// What was loaded, and how many milliseconds it took.
    pub loaded: Vec<(String, f64)>,
    pub runtime: Runtime,
    shared: Arc<Shared>,
    engine: thread::JoinHandle<()>,
    http: JoinHandle<std::io::Result<()>>,
    stop: oneshot::Sender<()>,
}

impl Server {
    pub fn start(settings: &Settings) -> Result<Self> {
        let vocabulary = Config::read(&settings.model)?.vocab_size;
        let shared = Arc::new(Shared::new(Queue::new(settings.queue), Text::read(&settings.model)?));
        // The model is loaded in the thread that runs it: libtorch would keep
        // worker threads for each of two, and let them sleep between operators.
        let (send, loaded) = mpsc::channel();
        let of_engine = (settings.clone(), Arc::clone(&shared));
        let engine = thread::Builder::new().name("model".into()).spawn(move || {
            let (settings, shared) = of_engine;
            let (engine, outcome) = match Engine::load_all(&settings, shared) {
                Ok((engine, times)) => (Some(engine), Ok(times)),
                Err(error) => (None, Err(error.to_string())),
            };
            // Nobody listens if the start failed elsewhere.
            if send.send(outcome).is_ok()
                && let Some(engine) = engine
            {
                engine.run();
            }
        })?;
        let loaded = loaded.recv()??;

        let runtime = Runtime::new()?;
        let listener = runtime.block_on(TcpListener::bind(settings.address))?;
        let address = listener.local_addr()?;
        let (max_length, folder) = (settings.max_length, settings.adapters.clone());
        let app = router(App { shared: Arc::clone(&shared), vocabulary, max_length, adapters: folder });
        let (stop, stopped) = oneshot::channel();
        let stopped = async { stopped.await.unwrap_or(()) };
        let http = runtime.spawn(async { axum::serve(listener, app).with_graceful_shutdown(stopped).await });
        Ok(Server { address, loaded, runtime, shared, engine, http, stop })
    }

    /// Takes no more connections, and answers all requests that are there.
    pub fn stop(self) -> Result<()> {
        // If the HTTP side ended by itself, it says why below.
        let _ = self.stop.send(());
        self.runtime.block_on(self.http)??;
        self.shared.queue.close();
        self.engine.join().map_err(|_| "the model's thread panicked")?;
        Ok(())
    }
}
