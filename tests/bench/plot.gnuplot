# The cost of a delivery against the number of clients, one line a server.
set terminal svg size 820,480 font "sans-serif,15" background "#ffffff"
set output output
set datafile separator "\t"
set datafile missing "?"
set title "What it costs to send one line of 64 bytes to one client"
set xlabel "clients"
set ylabel "µs of the server's processor time"
set logscale x 10
set logscale y 10
set yrange [0.05:*]
set ytics (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
set format x "%'.0f"
set grid ytics lc rgb "#dddddd"
set key outside right top
set border 3
set tics nomirror
plot for [i=1:words(servers)] data using 1:i+1 with linespoints \
  lw (word(servers, i) eq "rat" ? 4 : 1.5) pt 7 ps 0.6 \
  lc rgb (word(servers, i) eq "rat" ? "#d03020" : word("#3060a0 #30a060 #8050a0 #b08020 #208090 #707070 #a05050", i - 1 > 0 ? i - 1 : 1)) \
  title word(servers, i)
