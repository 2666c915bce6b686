# shellcheck shell=bash
#
# What every batch script of fedsim shares: set up the environment, start a run by torchrun or srun, in a container or
# not, hand a request to stop on to it, and decide what the job does when the run has ended. To be sourced:
#
#   source slurm/lib.sh
#   fedsim_env                                   # modules, virtual environment, conda, a file of your own
#   fedsim_job configs/quickstart.yaml run.rounds=20     # the arguments of fedsim.main; ends the script
#   fedsim_element manifest.jsonl                # instead: the arguments that stand in this array element's line
#
# What the job does when the step has ended, `status` being that of run.json in the run folder:
#
#   finished                              leaves with 0
#   the batch shell had SIGTERM           leaves, never asks for a requeue: scancel, or the end of a time limit
#   cut short by Slurm's preemption       requeues itself (it would else count as complete: it ended in the grace time)
#   preempted, and the job asked for it   requeues itself (SIGUSR1: the time limit is near; or run.max_minutes is over);
#                                         where no round was done since it started, that counts as a failure
#   preempted by a SIGTERM to processes   like a failure, see below: nobody who means the job sends it to them alone, but Slurm
#     alone, while the job runs on        does, late, to a node that comes back after it has failed
#   preempted, otherwise                  leaves with 0: a person asked for it, as with `touch RUN/stop`
#   failed by a mistake of the user       leaves with 2: the same mistake would be made again
#   failed otherwise                      requeues itself while the failures in a row without a new checkpoint are at most
#                                         FEDSIM_MAX_FAILURES, then leaves with the step's code
#
# Instead of a requeue, a job of a chain (FEDSIM_CHAIN) leaves, with 0 if it was only stopped, and the next one goes on; one
# that may not requeue itself (FEDSIM_REQUEUE=no) leaves with 75, or the step's code.
#
# Settings, all of them optional, from the environment of sbatch or from the script:
#
#   FEDSIM_LAUNCHER            torchrun (default): an agent on each node starts its processes; srun: one task a process
#   FEDSIM_PROCESSES           processes on each node; default: its GPUs, without any the tasks on a node (srun) or 1
#   FEDSIM_MAX_FAILURES        default: 3
#   FEDSIM_REQUEUE             no: never call `scontrol requeue`
#   FEDSIM_CHAIN               a name that the jobs of a chain share: no requeue; failures count, and a stop holds, for all
#   FEDSIM_MODULES             words for `module load`
#   FEDSIM_VENV                a virtual environment; default: .venv in the working folder, if it is there
#   FEDSIM_CONDA_ENV           name or folder of a conda environment
#   FEDSIM_SETUP               a file that is sourced last
#   FEDSIM_PYTHON              the interpreter; default: python
#   FEDSIM_CONTAINER           an image; then modules and environments above are those outside of it
#   FEDSIM_CONTAINER_RUNTIME   apptainer (default) or pyxis
#   FEDSIM_BINDS               folders that the container sees, with commas between them, besides the working folder, the
#                              run folder, FEDSIM_CACHE and HF_HOME; A:B shows A as B
#   FEDSIM_ARRAY_OFFSET        added to the array index to get the line of the manifest, from 0
#   FEDSIM_RETRY_S             seconds between attempts to reach Slurm's controller, of which there are 6; default: 5
#
# Written for bash 4.2 and newer; needs srun and scontrol, of which the container may be free.

fedsim_say() {
    printf '%s fedsim job: %s\n' "$(date '+%F %T')" "$*"
}

# The id that scontrol takes for this job alone. The last element of an array bears the id of the whole array.
fedsim_job_id() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Modules, environments and the user's own lines. Such scripts fail under `set -eu`, which is off meanwhile.
fedsim_env() {
    local options=$- name init
    set +eu
    if [[ -n ${FEDSIM_MODULES:-} ]]; then
        if ! type module >/dev/null 2>&1; then
            for init in "${MODULESHOME:-/usr/share/modules}/init/bash" /etc/profile.d/{lmod,modules}.sh; do
                # shellcheck disable=SC1090
                [[ -r $init ]] && source "$init" && break
            done
        fi
        for name in $FEDSIM_MODULES; do
            module load "$name" || _fedsim_leave 2 "module load $name failed; change FEDSIM_MODULES"
        done
    fi
    if [[ -n ${FEDSIM_CONDA_ENV:-} ]]; then
        name=$(conda shell.bash hook) ||
            _fedsim_leave 2 "conda was not found; load its module, or unset FEDSIM_CONDA_ENV"
        eval "$name"
        conda activate "$FEDSIM_CONDA_ENV" || _fedsim_leave 2 "conda environment $FEDSIM_CONDA_ENV cannot be activated"
    fi
    name=${FEDSIM_VENV:-}
    [[ -z $name && -z ${FEDSIM_CONDA_ENV:-} && -z ${FEDSIM_CONTAINER:-} && -x .venv/bin/python ]] && name=$PWD/.venv
    if [[ -n $name ]]; then
        [[ -x $name/bin/python ]] ||
            _fedsim_leave 2 "FEDSIM_VENV must be a virtual environment, and there is no $name/bin/python"
        export VIRTUAL_ENV=$name PATH=$name/bin:$PATH
    fi
    if [[ -n ${FEDSIM_SETUP:-} ]]; then
        [[ -r $FEDSIM_SETUP ]] || _fedsim_leave 2 "FEDSIM_SETUP must be a readable file, got $FEDSIM_SETUP"
        # shellcheck disable=SC1090
        source "$FEDSIM_SETUP" || _fedsim_leave 2 "FEDSIM_SETUP=$FEDSIM_SETUP ended with an error"
    fi
    [[ $options == *e* ]] && set -e
    [[ $options == *u* ]] && set -u
    return 0
}

# Run fedsim.main with these arguments, and end the job as the table above says.
fedsim_job() {
    _fedsim_begin
    _fedsim_check "$@"
    _fedsim_run
}

# The same with the arguments of this array element: a line of the manifest, JSON with a list `arguments`, or words.
fedsim_element() {
    if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
        _fedsim_leave 2 "an element of a sweep runs in a job array only: give sbatch --array=0-N"
    fi
    _fedsim_begin
    _fedsim_check --element "$1" "$((SLURM_ARRAY_TASK_ID + ${FEDSIM_ARRAY_OFFSET:-0}))"
    _fedsim_run
}

_fedsim_leave() {
    fedsim_say "$2" >&2
    exit "$1"
}

# Settings, and what fedsim reads from the environment.
_fedsim_begin() {
    fedsim_job=$(fedsim_job_id)
    fedsim_restart=${SLURM_RESTART_COUNT:-0}
    fedsim_nodes=${SLURM_JOB_NUM_NODES:-1}
    fedsim_launcher=${FEDSIM_LAUNCHER:-torchrun}
    case $fedsim_launcher in
        torchrun | srun) ;;
        *) _fedsim_leave 2 "FEDSIM_LAUNCHER must be torchrun or srun, got $fedsim_launcher" ;;
    esac
    local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}} tasks=1
    gpus=${gpus##*:}
    [[ $fedsim_launcher == srun ]] && tasks=${SLURM_NTASKS_PER_NODE:-1}
    [[ $gpus =~ ^[1-9][0-9]*$ ]] && tasks=$gpus
    fedsim_processes=${FEDSIM_PROCESSES:-$tasks}
    if [[ ! $fedsim_processes =~ ^[1-9][0-9]*$ ]]; then
        _fedsim_leave 2 "FEDSIM_PROCESSES must be a whole number > 0, got $fedsim_processes"
    fi
    # one process needs no agent, and its exit code then reaches this script
    ((fedsim_nodes * fedsim_processes > 1)) || fedsim_launcher=srun

    # steps get this environment, whatever `sbatch --export` said
    export SLURM_EXPORT_ENV=ALL
    # srun does not take over --cpus-per-task by itself since Slurm 22.05
    local cpus=${SLURM_CPUS_PER_TASK:-}
    if [[ $fedsim_launcher == srun && ${SLURM_NTASKS_PER_NODE:-1} != "$fedsim_processes" ]]; then
        cpus=$((${SLURM_CPUS_ON_NODE:-1} / fedsim_processes)) # of a task that was meant to be a torchrun
        if ((cpus == 0)); then # srun would refuse more tasks than cores
            cpus=1
            export SLURM_OVERCOMMIT=1
        fi
    fi
    # on the command line, since newer releases of Slurm refuse variables that contradict each other
    fedsim_cpus=()
    [[ -z $cpus ]] || fedsim_cpus=("--cpus-per-task=$cpus")
    # else torchrun's agents kill their processes 30 s after a SIGTERM; Slurm gives them the time that the site allows
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
    # torch 2.13's agents otherwise meet in a store that outlives their dead workers
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONFAULTHANDLER=1
    _fedsim_container
}

_fedsim_on_usr1() {
    fedsim_asked=1 fedsim_woken=1
    fedsim_say "SIGUSR1: the run is asked to stop after this round"
    [[ -z $fedsim_stop_file ]] || : >"$fedsim_stop_file"
}

_fedsim_on_term() {
    fedsim_term=1 fedsim_woken=1
    fedsim_say "SIGTERM: this job is being ended"
    [[ -z $fedsim_stop_file ]] || : >"$fedsim_stop_file"
}

# fedsim_inside: words before the interpreter. fedsim_srun: options of srun. fedsim_python: the interpreter.
_fedsim_container() {
    fedsim_inside=() fedsim_srun=() fedsim_python=${FEDSIM_PYTHON:-python}
    [[ -n ${FEDSIM_CONTAINER:-} ]] || return 0
    local binds=("$PWD") more=() bind program
    [[ ! -d ${FEDSIM_CACHE:-} ]] || binds+=("$FEDSIM_CACHE")
    [[ ! -d ${HF_HOME:-} ]] || binds+=("$HF_HOME")
    if [[ -n ${FEDSIM_BINDS:-} ]]; then
        IFS=, read -r -a more <<<"$FEDSIM_BINDS"
        binds+=("${more[@]}")
    fi
    [[ -z ${fedsim_run_dir:-} ]] || binds+=("${fedsim_run_dir%/*}")
    case ${FEDSIM_CONTAINER_RUNTIME:-apptainer} in
        apptainer)
            program=$(command -v apptainer || command -v singularity) ||
                _fedsim_leave 2 "neither apptainer nor singularity was found; load its module, as by FEDSIM_MODULES"
            fedsim_inside=("$program" exec --pwd "$PWD")
            [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || fedsim_inside+=(--nv)
            for bind in "${binds[@]}"; do fedsim_inside+=(--bind "$bind"); done
            fedsim_inside+=("$FEDSIM_CONTAINER")
            ;;
        pyxis)
            more=()
            for bind in "${binds[@]}"; do
                [[ $bind == *:* ]] || bind=$bind:$bind
                more+=("$bind")
            done
            fedsim_srun=("--container-image=$FEDSIM_CONTAINER" "--container-workdir=$PWD")
            fedsim_srun+=("--container-mounts=$(IFS=, && echo "${more[*]}")")
            ;;
        *)
            _fedsim_leave 2 "FEDSIM_CONTAINER_RUNTIME must be apptainer or pyxis, got $FEDSIM_CONTAINER_RUNTIME"
            ;;
    esac
}

# Ask fedsim which run this is, so that a mistake ends the job here, once, and a finished run starts nothing.
# Sets fedsim_run_dir and fedsim_args.
_fedsim_check() {
    local words field seen state threads code ask=() tries
    [[ ${#fedsim_srun[@]} -eq 0 ]] || ask=(srun --nodes=1 --ntasks=1 ${fedsim_cpus[@]+"${fedsim_cpus[@]}"} "${fedsim_srun[@]}")
    ask+=(${fedsim_inside[@]+"${fedsim_inside[@]}"} "$fedsim_python" -m launch check --fields)
    for tries in 1 2 3; do # a file system or a registry may be slow to come; a mistake (2) stays one
        words=() seen='' code=1
        while IFS= read -r -d '' field; do
            [[ -z $seen ]] || words+=("$field")
            [[ $field != *fedsim-check ]] || seen=1 # an image may greet before
            code=${field#*exit }
        done < <("${ask[@]}" "$@" </dev/null; printf 'exit %d\0' "$?")
        [[ $code != 0 && $code != 2 && -z $fedsim_term ]] || break
        ((tries == 3)) || _fedsim_pause
    done
    if [[ $code != 0 || ${#words[@]} -lt 4 ]]; then
        [[ $code != 0 ]] || code=1
        [[ $code == 2 ]] ||
            fedsim_say "'$fedsim_python -m launch check' failed: is fedsim's environment set up? see slurm/README.md"
        _fedsim_leave "$code" "nothing was started"
    fi
    fedsim_run_dir=${words[0]} state=${words[1]} threads=${words[2]}
    fedsim_args=("${words[@]:3:${#words[@]}-4}")
    export OMP_NUM_THREADS=$threads
    if ((fedsim_processes * threads > ${SLURM_CPUS_ON_NODE:-1024})); then
        fedsim_say "a node has $SLURM_CPUS_ON_NODE cores for $fedsim_processes processes of $threads threads;" \
            "they will be slow: ask for more, by --cpus-per-task"
    fi
    if [[ $state == finished ]]; then
        fedsim_say "run $fedsim_run_dir is finished; nothing to do"
        exit 0
    fi
}

# A value of run.json's top level. The earlier starts and the configuration in it stand deeper.
_fedsim_field() {
    sed -n '/^ "'"$1"'": /{s/^[^:]*: "\{0,1\}\([A-Za-z0-9_.]*\).*/\1/p;q}' "$fedsim_run_dir/run.json" 2>/dev/null || :
}

_fedsim_fingerprint() {
    cksum "$fedsim_run_dir/run.json" 2>/dev/null || :
}

# The newest checkpoint's round, 0 without any.
_fedsim_round() {
    local path last=0 number
    for path in "$fedsim_run_dir"/checkpoints/round_*; do
        number=${path##*/round_}
        [[ $number =~ ^[0-9]+$ ]] && ((10#$number > last)) && last=$((10#$number))
    done
    echo "$last"
}

_fedsim_pause() {
    sleep "${FEDSIM_RETRY_S:-5}"
}

# What Slurm knows of this job; a controller that is being restarted answers a little later.
_fedsim_show_job() {
    local tries
    for tries in {1..6}; do
        scontrol show job "$fedsim_job" 2>/dev/null && return 0
        _fedsim_pause
    done
    return 1
}

# Whether Slurm has preempted the job since it was last started.
_fedsim_preempted() {
    local job preempted
    job=$(_fedsim_show_job) || return 1
    [[ $job =~ PreemptTime=([0-9][^[:space:]]*) ]] || return 1
    preempted=${BASH_REMATCH[1]}
    [[ ! $job =~ [[:space:]]StartTime=([0-9][^[:space:]]*) || ! $preempted < ${BASH_REMATCH[1]} ]]
}

# Whether the job is to go on, as Slurm sees it: scancel changes that before any process hears of it. Where Slurm does not
# say, it is: what ends for good does not start again by itself, what starts again finds a finished run at worst.
_fedsim_runs_on() {
    local job
    job=$(_fedsim_show_job) || return 0
    [[ $job == *JobState=RUNNING* ]]
}

# Whether somebody stopped this run by its stop file.
_fedsim_stopped_by_file() {
    grep -q '^ "reason": "the stop file [^"]*/stop,' "$fedsim_run_dir/run.json" 2>/dev/null
}

# A port that depends on the job, below those that the system hands out; the next ones where it is taken on this node.
_fedsim_port() {
    local port=$((20000 + SLURM_JOB_ID % 10000)) tries
    for tries in {1..50}; do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
        port=$((20000 + (port + 7 * tries) % 10000))
    done
    echo "$port"
}

_fedsim_start() {
    local words=(srun "--nodes=$fedsim_nodes" --kill-on-bad-exit=1) agent=()
    words+=(${fedsim_cpus[@]+"${fedsim_cpus[@]}"})
    words+=(${fedsim_srun[@]+"${fedsim_srun[@]}"})
    MASTER_PORT=$(_fedsim_port)
    MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null) || MASTER_ADDR=''
    MASTER_ADDR=${MASTER_ADDR%%$'\n'*}
    MASTER_ADDR=${MASTER_ADDR:-${SLURMD_NODENAME:-$(hostname)}} # the batch script runs on the first node
    export MASTER_ADDR MASTER_PORT
    if [[ $fedsim_launcher == srun ]]; then
        words+=("--ntasks=$((fedsim_nodes * fedsim_processes))" "--ntasks-per-node=$fedsim_processes")
    else
        words+=("--ntasks=$fedsim_nodes" --ntasks-per-node=1)
        agent=(-m torch.distributed.run --nnodes "$fedsim_nodes" --nproc_per_node "$fedsim_processes" --max_restarts 0)
        if ((fedsim_nodes == 1)); then
            agent+=(--standalone) # finds a port by itself
        else
            agent+=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT")
            agent+=(--rdzv_id "$SLURM_JOB_ID.$fedsim_restart")
        fi
    fi
    words+=(${fedsim_inside[@]+"${fedsim_inside[@]}"} "$fedsim_python" ${agent[@]+"${agent[@]}"} -m fedsim.main)
    "${words[@]}" ${fedsim_args[@]+"${fedsim_args[@]}"} </dev/null &
    fedsim_pid=$!
}

_fedsim_run() {
    local notes=$fedsim_run_dir/slurm name=${FEDSIM_CHAIN:-$fedsim_job} before code=0 status=''
    mkdir -p "$notes" "$fedsim_run_dir/logs" || _fedsim_leave 2 "the run folder $fedsim_run_dir cannot be written"
    fedsim_failures=$notes/failures-$name fedsim_over=$notes/over-$name
    if [[ -n ${FEDSIM_CHAIN:-} && -e $fedsim_over ]]; then
        fedsim_say "nothing to do: an earlier job of this chain $(<"$fedsim_over")"
        exit 0
    fi
    _fedsim_container # once more: now the run folder is known
    before=$(_fedsim_fingerprint)
    rm -f "$notes/stop-$fedsim_job"-*
    fedsim_stop_file=$notes/stop-$fedsim_job-$fedsim_restart
    export FEDSIM_STOP_FILE=$fedsim_stop_file
    [[ -z $fedsim_term ]] || _fedsim_leave 143 "ended before the run was started"
    fedsim_first_round=$(_fedsim_round)
    [[ -z $fedsim_asked ]] || _fedsim_decide 75 preempted
    fedsim_say "job $fedsim_job, start $((fedsim_restart + 1)), on ${SLURM_JOB_NODELIST:-this node}: $fedsim_nodes x" \
        "$fedsim_processes processes by $fedsim_launcher, run folder $fedsim_run_dir"
    _fedsim_start
    while :; do # a trap ends `wait` early
        fedsim_woken=''
        code=0
        wait "$fedsim_pid" || code=$?
        [[ -n $fedsim_woken ]] || break
    done
    rm -f "$fedsim_stop_file"
    if [[ $(_fedsim_fingerprint) != "$before" ]]; then
        status=$(_fedsim_field status)
    elif ((code == 0)); then
        status=finished # the step had nothing to do
    fi
    fedsim_say "the step ended with code $code, the run is ${status:-as before}, at round $(_fedsim_round)"
    _fedsim_decide "$code" "$status"
}

# The table at the top of this file.
_fedsim_decide() {
    local code=$1 status=$2
    if [[ $status == finished ]]; then
        rm -f "$fedsim_failures"
        exit 0
    fi
    if [[ -n $fedsim_term ]]; then
        [[ -z $fedsim_asked || $status == preempted ]] ||
            fedsim_say "the round did not end in time; ask earlier: --signal=B:USR1@SECONDS, or --signal-lead"
        ((code)) || code=143
        exit "$code"
    fi
    if _fedsim_preempted; then
        _fedsim_requeue 0 "Slurm preempted it"
    fi
    if [[ $status == preempted && (-n $fedsim_asked || $(_fedsim_field reason) == run.max_minutes) ]] &&
        ! _fedsim_stopped_by_file; then
        [[ $(_fedsim_round) == "$fedsim_first_round" ]] || _fedsim_requeue 0 "it was asked to stop"
        fedsim_say "no round was done before it had to stop: is the time limit long enough?"
        _fedsim_count_failure 75
    fi
    if [[ $status == preempted && $(_fedsim_field reason) == SIGTERM ]] && _fedsim_runs_on; then
        fedsim_say "SIGTERM has reached processes, not this script: nobody has ended the job, as far as Slurm says"
        _fedsim_count_failure 75
    fi
    if [[ $status == preempted ]]; then
        fedsim_say "stopped on request; the same command goes on"
        [[ -z ${FEDSIM_CHAIN:-} ]] || echo "was stopped on request" >"$fedsim_over"
        exit 0
    fi
    if ((code == 2)) || [[ $status == failed && $(_fedsim_field user_error) == true ]]; then
        _fedsim_leave 2 "a mistake that another start would not mend; see above"
    fi
    ((code)) || code=1
    _fedsim_count_failure "$code"
}

_fedsim_count_failure() {
    local code=$1 count=0 seen='' now most=${FEDSIM_MAX_FAILURES:-3}
    now=$(_fedsim_round)
    [[ ! -s $fedsim_failures ]] || read -r count seen <"$fedsim_failures"
    [[ $seen == "$now" ]] || count=0
    count=$((count + 1))
    echo "$count $now" >"$fedsim_failures"
    if ((count <= most)); then
        _fedsim_requeue "$code" "failure $count of at most $most in a row at round $now"
    fi
    fedsim_say "giving up: failure $count in a row at round $now"
    rm -f "$fedsim_failures" # whoever starts it again has a new budget
    [[ -z ${FEDSIM_CHAIN:-} ]] || echo "gave up after $count failures in a row at round $now" >"$fedsim_over"
    exit "$code"
}

# Start over. Where that is not to be, leave with the code; 0 stands for work that is left to another job.
_fedsim_requeue() {
    if [[ -n ${FEDSIM_CHAIN:-} ]]; then
        _fedsim_leave "$1" "$2; the next job of the chain goes on"
    fi
    if [[ ${FEDSIM_REQUEUE:-} == no ]]; then
        (($1)) || set -- 75 "$2"
        _fedsim_leave "$1" "$2; the same command goes on where the run stopped"
    fi
    [[ -z $fedsim_term ]] || _fedsim_leave 143 "ended while it was about to be started again"
    fedsim_say "requeue $fedsim_job: $2"
    trap '' USR1
    trap - TERM # Slurm ends this script when it takes the job back
    local tries
    for tries in {1..6}; do
        scontrol requeue "$fedsim_job" && sleep 300
        _fedsim_pause
    done
    (($1)) || set -- 75
    _fedsim_leave "$1" "the requeue was refused; the same command goes on where the run stopped"
}

# From here on, so that a signal during `fedsim_env`, which may take minutes, is not the end of the job.
fedsim_asked='' fedsim_term='' fedsim_woken='' fedsim_stop_file=''
trap '_fedsim_on_usr1' USR1
trap '_fedsim_on_term' TERM
