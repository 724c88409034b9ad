"""The whole platform on one machine, from Python wheels: no containers, nothing to install.

What a command line needs (all synchronous):

    config = StackConfig.from_environment()              config.py     may raise ConfigInvalid
    run_foreground(config, report) -> int                control.py    until Ctrl-C; the exit code
    start_detached(config, report) -> int                control.py    returns when ready (0) or not (1)
    status(config) -> StackStatus                        control.py    never fails
    stop(config, report) -> bool                         control.py    False: nothing ran
    read_dev_env(config.dev_env_path) -> dict[str, str]  credentials.py  URL, key, secrets once ready

`report` is a callable that takes one `Event` (events.py): StepStarted and StepFinished while starting,
StackReady or StartAborted, then ChildDied, ChildRestarted, GaveUp, Stopping, Stopped. `sentence(event)` puts
any of them into words, and `report_to_stderr` is a report that does only that.

What tests need (all async context managers, ready on entry):

    EmbeddedPostgres(home, port, durable=False)          postgres.py
    EmbeddedValkey(home, port)                           valkey.py
    Stack(config, report=report)                         stack.py      everything, in this process
    FaultProxy(target_host, target_port)                 fault_proxy.py
    free_ports(count), free_port()                       ports.py

Below them: `supervisor` keeps `child`ren running and `state` writes down which; `launch` and `unprivileged`
start each so that it is no root's server and cannot outlive its supervisor; `errors` has what can go wrong.

The home (`./.usameter`) holds: `postgres/`, `valkey/`, `logs/<child>.log`, `state.json` (what runs),
`lock` (who owns it), `secrets.json` and `dev.env` (0600). Servers listen on 127.0.0.1 only, and without
passwords: the machine's own users are trusted, as on a developer's machine. This is no way to deploy.

Nothing is imported here: PostgreSQL's client costs 0.2 s, and a status should not.
"""
