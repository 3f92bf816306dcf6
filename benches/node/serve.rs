//! The daemon's process: starts and ends the daemon as it is told, over one simulated node.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lunplug::config::Config;
use lunplug::daemon;
use lunplug::host::sim::SimHost;
use lunplug::vm::registry::Registry;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::common::{self, Stores};

struct Life {
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    registry: Arc<Registry>,
}

impl Life {
    async fn begin(host: &SimHost, config: &Config) -> Self {
        let (socket, listener) = daemon::bind(config).unwrap();
        let registry = common::start(host, config, Stores::Files).await;
        let (stop, stopped) = oneshot::channel();
        let (config, volumes) = (config.clone(), registry.clone());
        let serving = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            daemon::serve(&config, volumes, listener, stopped).await.unwrap();
            drop(socket);
        });
        Self { stop, serving, registry }
    }

    async fn end(self) {
        self.stop.send(()).unwrap();
        self.serving.await.unwrap();
        self.registry.stop(Duration::from_secs(10)).await;
    }
}

/// Serves, and does what each line of standard input says.
pub fn run(dir: &Path, vms: u32) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    // In memory, as /run is.
    let run = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = Config { run_dir: run.path().join("run"), ..common::config(dir, vms) };
    let host = common::node(vms);
    let mut life = runtime.block_on(Life::begin(&host, &config));
    println!("0");
    for line in std::io::stdin().lock().lines() {
        match line.unwrap().as_str() {
            "restart" => {
                let before = common::heap::in_use();
                runtime.block_on(life.end());
                let own = before.saturating_sub(common::heap::in_use());
                let begin = Instant::now();
                life = runtime.block_on(Life::begin(&host, &config));
                println!("{own} {}", begin.elapsed().as_secs_f64());
            }
            "heap" => {
                println!("{} {}", common::heap::in_use(), common::heap::peak());
                common::heap::forget_peak();
            }
            _ => break,
        }
    }
    runtime.block_on(life.end());
    runtime.shutdown_background();
}
