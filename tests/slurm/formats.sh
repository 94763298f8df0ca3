# What membench asks of sacct and squeue; tests/test_slurm_state.py compares it with the code.
SACCT_FORMAT=JobID,JobName,State,ExitCode,Reason,NodeList,Submit,Start,End,ElapsedRaw
SQUEUE_FORMAT='JobArrayID:|,Name:|,State:|,Reason:|,RestartCnt:|,NodeList:|'
